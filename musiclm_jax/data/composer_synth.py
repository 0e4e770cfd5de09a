"""The composer's instruments: notes from additive tables, mixed by adding arrays.

A table holds one long note of (timbre, pitch); a shorter note is its beginning with a release. Tables are
computed in float64 and the mix lands on the 16-bit grid, so two platforms differ by one step at most.

Legend: N samples, T samples of a table.
"""
from __future__ import annotations

from collections.abc import Callable
import functools

import numpy as np

from musiclm_jax.data import composer_score
from musiclm_jax.data.composer_score import SAMPLE_RATE, Score, mix

TOP_HZ = 7000.0  # no partial lies above this: the energy stays where a small codec can follow it
_TABLES_KEPT = 384  # at most 384 tables of at most 4.2 s in float32: below 160 MB
# A gentle slope over all partials: waveform losses see energy, which a small codec learns from the bottom up,
# while the timbre stays as clear as it was in a logarithmic spectrum.
_SLOPE_HZ = 700.0
_RELEASE = 720  # samples, 30 ms
# Bow, breath, pick and hammer noise: broadband, at this level beside the tone, and as loud as the tone is at each
# moment. Without it the bands above the partials hold nothing that changes.
_AIR = 0.05

# Level of each part in the mix; tables have unit level over their first 0.2 s.
_GAIN = {'chords': 0.2, 'bass': 0.5, 'drums': 0.75}
# Struck and plucked notes die away and are given more to start with.
_LEAD_GAIN = {'guitar': 1.25, 'piano': 1.3, 'marimba': 1.6, 'bell': 1.15}


def _time(seconds: float) -> np.ndarray:
  return np.arange(int(seconds * SAMPLE_RATE), dtype=np.float64) / SAMPLE_RATE


def _noise(length: int, salt: int) -> np.ndarray:
  """White noise in [-1, 1) from the counter hash."""
  n = np.arange(length, dtype=np.uint64) + np.uint64(mix(salt + 1))
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    n = (n ^ (n >> np.uint64(shift))) * np.uint64(factor)
  n ^= n >> np.uint64(31)
  return (n >> np.uint64(11)).astype(np.float64) * (2.0 / (1 << 53)) - 1.0


def _smooth(x_N: np.ndarray, width: int) -> np.ndarray:
  """A moving average: a cheap low-pass with its first zero at SAMPLE_RATE / width."""
  return np.convolve(x_N, np.full(width, 1.0 / width), mode='same')


def _phase(hz: float, t_T: np.ndarray, vibrato: float = 0.0, rate: float = 5.2) -> np.ndarray:
  """Phase of a tone whose frequency swings by the share `vibrato`, starting 0.15 s into the note."""
  phase = 2 * np.pi * hz * t_T
  if vibrato:
    depth = np.minimum(t_T / 0.15, 1.0)
    phase = phase + depth * (hz * vibrato / rate) * np.sin(2 * np.pi * rate * t_T)
  return phase


def _harmonics(phase_T: np.ndarray, hz: float, amplitudes: np.ndarray,
               envelope: Callable[[int], np.ndarray | float]) -> np.ndarray:
  """Sum of amplitude_k * envelope(k) * sin(k * phase), by the recurrence of multiple angles."""
  twice_cosine, before, now = 2 * np.cos(phase_T), np.zeros_like(phase_T), np.sin(phase_T)
  out, term = np.zeros_like(phase_T), np.empty_like(phase_T)
  for k, amplitude in enumerate(amplitudes, start=1):
    if k * hz > TOP_HZ:
      break
    if amplitude:
      np.multiply(now, amplitude * _slope(k * hz) * envelope(k), out=term)
      out += term
    np.multiply(twice_cosine, now, out=term)
    term -= before
    before, now, term = now, term, before
  return out


def _slope(hz: float) -> float:
  return (1.0 + (hz / _SLOPE_HZ) ** 2) ** -0.5


def _attack(t_T: np.ndarray, seconds: float) -> np.ndarray:
  return np.minimum(t_T / seconds, 1.0)


def _fade(t_T: np.ndarray, rate: float) -> np.ndarray:
  """A note begins with weight and is then let go, but never falls silent."""
  return 0.06 + 0.94 * np.exp(-rate * t_T)


def _guitar(hz: float) -> np.ndarray:  # plucked at a fifth of the string: every fifth harmonic is missing
  t, k = _time(2.4), np.arange(1, 17)
  rate = 2.8 * (hz / 220) ** 0.3
  tone = _harmonics(_phase(hz, t), hz, np.sin(np.pi * k / 5) / k ** 0.8,
                    lambda n: np.exp(-rate * (1 + 0.35 * n) * t))
  return tone * _attack(t, 0.002)


def _piano(hz: float) -> np.ndarray:  # two strings a little apart, stretched partials, two-stage decay
  t, out = _time(2.4), 0.0
  decay = 0.5 * np.exp(-5.0 * t) + 0.5 * np.exp(-0.8 * t)
  for k in range(1, 9):
    f = k * hz * np.sqrt(1 + 5e-4 * k * k)
    if f > TOP_HZ:
      break
    amplitude = (1.0, 0.85, 0.6, 0.55, 0.3, 0.3, 0.18, 0.12)[k - 1] * _slope(f)
    beat = np.sin(2 * np.pi * f * t) + 0.6 * np.sin(2 * np.pi * (f + 0.9 * k ** 0.5) * t + 0.7)
    out = out + amplitude * beat * decay * np.exp(-0.8 * (k - 1) * t)
  return out * _attack(t, 0.006)


def _marimba(hz: float) -> np.ndarray:
  t = _time(0.9)
  out = np.sin(2 * np.pi * hz * t) * np.exp(-9 * t)
  for ratio, amplitude, decay in ((3.93, 0.8, 26.0), (9.2, 0.5, 50.0)):
    if hz * ratio < TOP_HZ:
      out = out + amplitude * np.sin(2 * np.pi * hz * ratio * t) * np.exp(-decay * t)
  return out * _attack(t, 0.001)


def _bell(hz: float) -> np.ndarray:  # the partials of a free bar, far from harmonic
  t, out = _time(2.4), 0.0
  for ratio, amplitude, decay in ((1.0, 1.0, 1.2), (2.76, 0.8, 1.8), (5.4, 0.6, 3.0)):
    if hz * ratio < TOP_HZ:
      out = out + amplitude * np.sin(2 * np.pi * hz * ratio * t) * np.exp(-decay * t)
  return out * _attack(t, 0.001)


def _flute(hz: float) -> np.ndarray:  # nearly a sine, with breath
  t = _time(3.0)
  tone = _harmonics(_phase(hz, t, 0.002), hz, np.array([1.0, 0.16, 0.05, 0.015]), lambda n: 1.0)
  breath = _smooth(_smooth(_noise(t.size, 11), 6), 9) * (0.12 + 0.3 * np.exp(-18 * t))
  return (tone * (1 + 0.12 * np.sin(2 * np.pi * 5 * t)) + breath) * _attack(t, 0.05) * _fade(t, 1.6)


def _violin(hz: float) -> np.ndarray:
  t, k = _time(3.0), np.arange(1, 25)
  f = k * hz
  amplitudes = k ** -0.75 * (1 + 1.2 * np.exp(-((f - 3000) / 1200) ** 2))
  tone = _harmonics(_phase(hz, t, 0.004, 5.8), hz, amplitudes, lambda n: 1.0)
  return tone * _attack(t, 0.09) * _fade(t, 1.8)


def _organ(hz: float) -> np.ndarray:  # drawbars at 16', 8', 4', 2 2/3', 2' and 1'
  t = _time(3.0)
  bars = np.zeros(16)
  bars[[0, 1, 3, 5, 7, 15]] = (0.9, 1.0, 0.8, 0.35, 0.6, 0.3)
  return _harmonics(_phase(hz / 2, t), hz / 2, bars, lambda n: 1.0) * _attack(t, 0.008) * _fade(t, 0.8)


def _trumpet(hz: float) -> np.ndarray:  # a formant near 1.4 kHz that opens as the note begins
  t, k = _time(3.0), np.arange(1, 15)
  f = k * hz
  amplitudes = 0.2 * k ** -0.5 + np.exp(-((f - 1500) / 900) ** 2)
  amplitudes = amplitudes * np.where(f > 3500, np.exp(-(f - 3500) / 1800), 1.0)
  tone = _harmonics(_phase(hz, t), hz, amplitudes, lambda n: 1 - np.exp(-t / (0.012 + 0.014 * n)))
  return tone * _attack(t, 0.02) * (0.75 + 0.35 * np.exp(-4 * t))


def _synth(hz: float) -> np.ndarray:  # a square wave behind a closing filter
  t, k = _time(3.0), np.arange(1, 24)
  amplitudes = np.where(k % 2 == 1, 1.0 / k ** 0.7, 0.0)
  tone = _harmonics(_phase(hz, t), hz, amplitudes, lambda n: 0.12 + 0.88 * np.exp(-0.55 * (n - 1) * t))
  return tone * _attack(t, 0.004) * _fade(t, 2.4)


def _voice(hz: float) -> np.ndarray:  # the formants of an open "ah", wide vibrato
  t, k = _time(3.0), np.arange(1, 25)
  f = k * hz
  formants = sum(a * np.exp(-((f - centre) / width) ** 2)
                 for centre, a, width in ((750, 1.0, 160), (1200, 0.7, 170), (2800, 0.18, 250)))
  tone = _harmonics(_phase(hz, t, 0.011, 5.0), hz, formants + 0.12 / k, lambda n: 1.0)
  return tone * (1 + 0.15 * np.sin(2 * np.pi * 5.0 * t + 1)) * _attack(t, 0.1) * _fade(t, 1.6)


def _pad(hz: float) -> np.ndarray:
  t, k = _time(4.2), np.arange(1, 7)
  tone = _harmonics(_phase(hz, t, 0.001, 0.7), hz, k ** -1.3, lambda n: 1.0)
  return tone * _attack(t, 0.12) * _fade(t, 1.5)


def _stab(hz: float) -> np.ndarray:
  t, k = _time(0.6), np.arange(1, 9)
  return _harmonics(_phase(hz, t), hz, k ** -0.7, lambda n: np.exp(-5 * t)) * _attack(t, 0.003)


def _arpeggio(hz: float) -> np.ndarray:
  t, k = _time(1.0), np.arange(1, 7)
  return _harmonics(_phase(hz, t), hz, k ** -1.4, lambda n: np.exp(-(2 + 2 * n) * t)) * _attack(t, 0.002)


def _bass(hz: float) -> np.ndarray:
  t = _time(4.2)
  amplitudes = np.array([1.0, 0.6, 0.3, 0.15, 0.08])
  return (_harmonics(_phase(hz, t), hz, amplitudes, lambda n: 0.35 + 0.65 * np.exp(-(0.8 + n) * t))
          * _attack(t, 0.008) * _fade(t, 1.8))


_TONES: dict[str, Callable[[float], np.ndarray]] = {
    'guitar': _guitar, 'piano': _piano, 'marimba': _marimba, 'bell': _bell, 'flute': _flute,
    'violin': _violin, 'organ': _organ, 'trumpet': _trumpet, 'synth': _synth, 'voice': _voice,
    'pad': _pad, 'stab': _stab, 'arpeggio': _arpeggio, 'bass': _bass,
}


@functools.lru_cache(maxsize=1)
def _room() -> np.ndarray:
  """A second of room tone at -66 dB: without it the bands above the music hold nothing but rounding noise."""
  room = (0.0009 * _noise(SAMPLE_RATE, 99)).astype(np.float32)
  room.flags.writeable = False
  return room


def _drum(pitch: int) -> np.ndarray:
  """Short drums with little noise, already at their level in the mix."""
  if pitch == composer_score.KICK:
    t = _time(0.22)
    return 1.5 * np.sin(2 * np.pi * (48 * t + 3.2 * (1 - np.exp(-28 * t)))) * np.exp(-14 * t)
  if pitch == composer_score.SNARE:
    t = _time(0.16)
    body = 0.5 * np.sin(2 * np.pi * 185 * t) * np.exp(-26 * t)
    return body + 1.1 * _smooth(_noise(t.size, 1), 4) * np.exp(-24 * t)
  if pitch == composer_score.CLAP:
    t = _time(0.12)
    return 1.0 * np.diff(_smooth(_noise(t.size + 1, 2), 5)) * 2.0 * np.exp(-30 * t)
  if pitch == composer_score.RIM:
    t = _time(0.05)
    return 0.9 * np.sin(2 * np.pi * 820 * t) * np.exp(-80 * t)
  length, level, decay = {
      composer_score.HAT: (0.05, 0.28, 70.0), composer_score.OPEN_HAT: (0.14, 0.3, 22.0),
      composer_score.SHAKER: (0.07, 0.34, 40.0)}[pitch]
  t = _time(length)
  rise = _attack(t, 0.02 if pitch == composer_score.SHAKER else 0.001)
  return level * np.diff(_smooth(_noise(t.size + 1, pitch), 3)) * rise * np.exp(-decay * t) * 1.6


@functools.lru_cache(maxsize=_TABLES_KEPT)
def _table(timbre: str, pitch: int) -> np.ndarray:
  """One long note as float32 [T], read-only; its level over the first 0.2 s is 1 for tones."""
  if timbre == 'drums':
    table = _drum(pitch)
  else:
    table = _TONES[timbre](440.0 * 2.0 ** ((pitch - 69) / 12))
    table = table / np.sqrt(np.mean(np.square(table[:SAMPLE_RATE // 5])))
    loudness = _smooth(np.abs(table), 240)
    table = table + _AIR * loudness ** 2 * _noise(table.size, pitch)
  table = table.astype(np.float32)
  table.flags.writeable = False
  return table


def mix_notes(score: Score) -> np.ndarray:
  """The sum of all notes as float32 [N], before the level is set."""
  timbres = {'lead': score.lead, 'chords': score.chord_style, 'bass': 'bass', 'drums': 'drums'}
  gains = {**_GAIN, 'lead': _LEAD_GAIN.get(score.lead, 1.0)}
  total = score.samples
  mixed_N = np.zeros(total, np.float32)
  ramp = np.linspace(1.0, 0.0, _RELEASE, dtype=np.float32)
  for note in score.notes:
    begin = score.sample_of(note.start)
    if begin >= total:
      continue
    table_T = _table(timbres[note.part], note.pitch)
    length = table_T.size
    if note.part != 'drums':
      length = min(score.sample_of(note.duration) + _RELEASE, length)
    sound = table_T[:length] * np.float32(gains[note.part] * note.velocity / 127)
    if note.part != 'drums':
      sound[-_RELEASE:] *= ramp
    end = min(begin + length, total)
    mixed_N[begin:end] += sound[:end - begin]
  return mixed_N


def render(score: Score) -> np.ndarray:
  """The score as mono audio: float32 [N] with N = round(seconds * 24000), every value k / 32767.

  The peak follows the velocities: about 0.35 for soft pieces, up to 0.9 for loud ones, never more.
  """
  audio_N = mix_notes(score)
  peak = float(np.max(np.abs(audio_N)))
  level = 0.89 * max((note.velocity for note in score.notes), default=0) / 127
  if peak:
    audio_N *= np.float32(min(level, 0.89) / peak)
  audio_N += np.resize(_room(), audio_N.size)
  return np.rint(audio_N * np.float32(32767)) / np.float32(32767)
