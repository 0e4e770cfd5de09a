"""Pictures and players of the report: spectrograms, loss curves, lossless audio, all as data URIs.

N samples, F frames, M mel bands, H and W pixels.
"""
from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import io
import pathlib
from typing import Any

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker
from matplotlib.backends import backend_agg
import numpy as np
import soundfile

from musiclm_jax.nn import spectral
from musiclm_jax.training import metrics

_COLOURS = ('#2563eb', '#d97706', '#059669', '#be185d', '#6d28d9', '#475569')
_SPECTROGRAM_INCHES = (5.2, 1.9)
_TICKS_HZ = (100, 300, 1000, 3000, 10000)


def data_uri(content: bytes, kind: str) -> str:
  """`content` of media type `kind` as a URI that needs no other file."""
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def audio_uri(audio_N: np.ndarray, sample_rate: int = 24000) -> str:
  """A FLAC of 16 bit: lossless, half the size of WAV, and every current browser plays it."""
  buffer = io.BytesIO()
  audio_N = np.clip(np.nan_to_num(np.asarray(audio_N, np.float32)), -1.0, 1.0)
  soundfile.write(buffer, audio_N, sample_rate, format='FLAC', subtype='PCM_16')
  return data_uri(buffer.getvalue(), 'audio/flac')


def _bytes(figure: matplotlib_figure.Figure, kind: str) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format=kind, facecolor='white', metadata={'Date': None} if kind == 'svg' else None)
  return buffer.getvalue()


def _uri(figure: matplotlib_figure.Figure, kind: str) -> str:
  return data_uri(_bytes(figure, kind), 'image/svg+xml' if kind == 'svg' else 'image/png')


def spectrogram(audio_N: np.ndarray, sample_rate: int = 24000, *, bands: int = 96) -> np.ndarray:
  """Log-mel spectrogram in dB relative to full scale, [F, M], at most about 1200 frames."""
  audio_N = np.asarray(audio_N, np.float32)
  hop = 256 * max(1, len(audio_N) // (256 * 1200))
  config = spectral.MelConfig(
      sample_rate=sample_rate, window=max(2048, hop), hop=hop, bands=bands, low_hz=30.0, floor=1e-5)
  return np.asarray(spectral.log_mel(audio_N[None], config))[0] * (20 / np.log(10))


def spectrogram_uri(audio_N: np.ndarray, sample_rate: int = 24000) -> str:
  """Picture of `spectrogram`: time to the right, pitch upwards, bright is loud (80 dB range)."""
  figure = matplotlib_figure.Figure(figsize=_SPECTROGRAM_INCHES, dpi=110, layout='constrained')
  _draw_spectrogram(figure.subplots(), audio_N, sample_rate)
  return _uri(figure, 'png')


def spectrograms(sounds: Mapping[str, np.ndarray], sample_rate: int = 24000) -> np.ndarray:
  """Spectrograms of sounds by name, one below the other, as a picture of uint8 [H, W, 3]; of the mean of channels.

  Sounds are [N], or [N, C] of C channels.
  """
  width, height = _SPECTROGRAM_INCHES
  figure = matplotlib_figure.Figure(figsize=(width, height * len(sounds)), dpi=110, layout='constrained')
  canvas = backend_agg.FigureCanvasAgg(figure)
  for axes, (name, audio_N) in zip(figure.subplots(len(sounds), squeeze=False)[:, 0], sounds.items()):
    _draw_spectrogram(axes, audio_N if audio_N.ndim == 1 else audio_N.mean(axis=1), sample_rate)
    axes.set_title(name, fontsize=8, loc='left')
  canvas.draw()
  return np.array(canvas.buffer_rgba())[..., :3]


def _draw_spectrogram(axes: matplotlib_axes.Axes, audio_N: np.ndarray, sample_rate: int) -> None:
  db_FxM = spectrogram(audio_N, sample_rate)
  bands = db_FxM.shape[1]
  seconds = len(audio_N) / sample_rate
  axes.imshow(
      db_FxM.T, origin='lower', aspect='auto', cmap='magma', vmin=-95, vmax=-15, interpolation='nearest',
      extent=(0, seconds, 0, bands))
  mel = lambda hz: np.log10(1 + np.asarray(hz) / 700)
  place = lambda hz: (mel(hz) - mel(30.0)) / (mel(sample_rate / 2) - mel(30.0)) * bands
  ticks = [hz for hz in _TICKS_HZ if hz < sample_rate / 2]
  axes.set_yticks([place(hz) for hz in ticks], [f'{hz // 1000}k' if hz >= 1000 else str(hz) for hz in ticks])
  axes.tick_params(labelsize=7, length=2)
  axes.set_xlabel('seconds', fontsize=7)
  axes.set_ylabel('Hz', fontsize=7)


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of a metrics file (`training.metrics.read`) joined by step, in order; of a step that was run twice, the
  later line.

  What a line of another part than 'train' holds is named after it ("eval/loss").
  """
  rows: dict[int, dict[str, Any]] = {}
  for row in metrics.read(path):
    part = row.pop('part', 'train')
    prefix = '' if part == 'train' else f'{part}/'
    step = row.pop('step')
    rows.setdefault(step, {'step': step}).update({prefix + name: value for name, value in row.items()})
  return [rows[step] for step in sorted(rows)]


def loss_names(rows: Sequence[Mapping[str, Any]], limit: int = 5) -> list[str]:
  """Names of the losses in the rows: the total and its held-out value first, then the terms."""
  names = {
      name for row in rows for name, value in row.items()
      if isinstance(value, (int, float)) and ('loss' in name.lower() or 'cross_entropy' in name.lower())}
  depth = lambda name: (name.split('/')[-1] != 'loss', name.count('/'), name)
  return sorted(names, key=depth)[:limit]


def loss_curves_uri(rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> str | None:
  """Losses over steps as a vector picture; None where the rows hold no loss."""
  names = loss_names(rows) if names is None else list(names)
  series = {}
  for name in names:
    points = [(r['step'], r[name]) for r in rows if isinstance(r.get(name), (int, float))]
    points = [p for p in points if np.isfinite(p[1])]
    if points:
      series[name] = np.array(points, float).T
  if not series:
    return None
  figure = matplotlib_figure.Figure(figsize=(5.2, 2.5), layout='constrained')
  axes = figure.subplots()
  for colour, (name, (steps, values)) in zip(_COLOURS, series.items()):
    few = len(steps) < 40
    axes.plot(steps, values, color=colour, lw=1.6 if few else 0.6, alpha=1.0 if few else 0.35,
              marker='.' if len(steps) < 15 else None, label=name if few else None)
    if not few:
      axes.plot(steps, _smooth(values), color=colour, lw=1.6, label=name)
  everything = np.concatenate([v for _, v in series.values()])
  if everything.min() > 0 and everything.max() > 20 * everything.min():
    axes.set_yscale('log')
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  _frame(axes)
  axes.set_xlabel('step', fontsize=8)
  axes.tick_params(labelsize=8)
  axes.legend(fontsize=7, frameon=False)
  return _uri(figure, 'svg')


def rate_distortion(curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
                    lines: Mapping[str, Sequence[float]], measures: Sequence[str]) -> bytes:
  """A PNG with one panel for each measure over the bitrate.

  Args:
    curves: by name, (kbit/s of each point, for each measure the values of the points).
    lines: by name, for each measure the value of something that has no bitrate: a horizontal line.
  """
  figure = matplotlib_figure.Figure(figsize=(4.2 * len(measures), 3.2), dpi=130, layout='constrained')
  for i, (axes, measure) in enumerate(zip(figure.subplots(1, len(measures), squeeze=False)[0], measures)):
    for colour, (name, (rates, values)) in zip(_COLOURS, curves.items()):
      axes.plot(rates, values[i], color=colour, marker='o', ms=3.5, lw=1.4, label=name)
    for colour, style, (name, values) in zip(_COLOURS[len(curves):], ('--', ':', '-.'), lines.items()):
      axes.axhline(values[i], color=colour, ls=style, lw=1.2, label=name)
    axes.set_xscale('log')
    axes.set_xticks(ticks := [2.0 ** n for n in range(-2, 8)], [f'{t:g}' for t in ticks])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    rates = [rate for points, _ in curves.values() for rate in points]
    axes.set_xlim(0.8 * min(rates), 1.25 * max(rates))
    _frame(axes)
    axes.set_xlabel('kbit/s', fontsize=8)
    axes.set_title(measure, fontsize=9)
    axes.tick_params(labelsize=8)
    if not i:
      axes.legend(fontsize=7, frameon=False)
  return _bytes(figure, 'png')


def over_layers(panels: Mapping[str, tuple[Mapping[str, Sequence[float]], Mapping[str, float]]],
                layers: Sequence[str]) -> bytes:
  """A PNG with a panel for each name: curves over the layers, and horizontal lines."""
  columns = min(4, len(panels))
  figure = matplotlib_figure.Figure(figsize=(3.4 * columns, 2.6 * -(-len(panels) // columns)), dpi=130,
                                    layout='constrained')
  grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).reshape(-1)
  for axes in grid[len(panels):]:
    axes.set_visible(False)
  for axes, (name, (curves, lines)) in zip(grid, panels.items()):
    for i, (label, values) in enumerate(curves.items()):
      axes.plot(layers, values, color=_COLOURS[i // 2], ls=':' if i % 2 else '-', marker='o', ms=3, lw=1.4, label=label)
    for style, (label, value) in zip(('--', ':', '-.'), lines.items()):
      axes.axhline(value, color=_COLOURS[-1], ls=style, lw=1.1, label=label)
    _frame(axes)
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=7)
  figure.legend(*grid[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=7, frameon=False)
  return _bytes(figure, 'png')


def _frame(axes: matplotlib_axes.Axes) -> None:
  """What all plots of curves share: two sides and a light grid."""
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
  axes.grid(color='#e5e7eb', lw=0.6)


def _smooth(values_N: np.ndarray) -> np.ndarray:
  """Running mean over a twentieth of the curve, shorter at its ends."""
  radius = max(1, len(values_N) // 40)
  total = np.concatenate([[0.0], np.cumsum(values_N)])
  index = np.arange(len(values_N))
  low, high = np.maximum(0, index - radius), np.minimum(len(values_N), index + radius + 1)
  return (total[high] - total[low]) / (high - low)
