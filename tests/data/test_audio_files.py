"""Audio files: four formats, every kind of fault, streaming."""
import pickle
import resource

import numpy as np
import pytest
import soundfile

from musiclm_jax.data import audio_files

FORMATS = {'wav': {}, 'flac': {}, 'ogg': {}, 'mp3': {}}


def tone(seconds=2.0, rate=24000, hertz=440.0, channels=1):
  wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
  return wave if channels == 1 else np.stack([wave * (c + 1) / channels for c in range(channels)], axis=1)


def write(path, audio, rate=24000, **options):
  soundfile.write(path, audio, rate, **options)
  return path


def signal_to_noise(x, reference):
  length = min(len(x), len(reference))
  noise = x[:length] - reference[:length]
  return 10 * np.log10(np.sum(reference[:length] ** 2) / np.sum(noise ** 2))


@pytest.mark.parametrize('extension', FORMATS)
@pytest.mark.parametrize('rate', [8000, 24000, 44100])
def test_formats_and_rates_round_trip(tmp_path, extension, rate):
  path = write(tmp_path / f'a.{extension}', tone(rate=rate), rate, **FORMATS[extension])
  info = audio_files.check(path)
  assert (info.sample_rate, info.channels) == (rate, 1)
  assert info.seconds == pytest.approx(2.0)
  audio = audio_files.read(path)
  assert audio.dtype == np.float32 and abs(len(audio) - 48000) <= 1
  assert signal_to_noise(audio, tone()) > (15 if extension in ('ogg', 'mp3') else 35)


@pytest.mark.parametrize('options', [
    {'subtype': 'PCM_24'}, {'subtype': 'PCM_U8'}, {'subtype': 'FLOAT'}, {'subtype': 'ALAW'}])
def test_sample_formats(tmp_path, options):
  audio = audio_files.read(write(tmp_path / 'a.wav', tone(), **options))
  assert signal_to_noise(audio, tone()) > 25


def test_192_kilohertz_and_many_channels(tmp_path):
  path = write(tmp_path / 'a.wav', tone(rate=192000, channels=6), 192000)
  audio = audio_files.read(path)
  assert audio.shape == (48000,)
  assert signal_to_noise(audio, tone() * np.mean(np.arange(1, 7) / 6)) > 35


def test_two_channels_stay_two_and_one_is_repeated(tmp_path):
  path = write(tmp_path / 'a.wav', tone(rate=48000, channels=2), 48000, subtype='FLOAT')
  segments = list(audio_files.segments(path, 0.5, 48000, 2))
  assert [s.shape for s in segments] == [(24000, 2)] * 4
  np.testing.assert_allclose(np.concatenate(segments), tone(rate=48000, channels=2), atol=1e-6)
  resampled = np.concatenate(list(audio_files.segments(path, 0.5, 24000, 2)))
  for channel in (0, 1):
    assert signal_to_noise(resampled[:, channel], tone(channels=2)[:, channel]) > 35
  mono = write(tmp_path / 'mono.wav', tone(), subtype='FLOAT')
  both = np.concatenate(list(audio_files.segments(mono, 0.5, 24000, 2)))
  np.testing.assert_array_equal(both[:, 0], both[:, 1])
  np.testing.assert_allclose(both[:, 0], tone(), atol=1e-6)


def test_more_channels_than_wanted_are_refused_unless_they_are_averaged(tmp_path):
  path = write(tmp_path / 'a.wav', tone(channels=6))
  assert audio_files.check(path).channels == 6
  with pytest.raises(audio_files.AudioFault, match='number of channels: 6, where 2 are wanted: mix it to 2 first'):
    audio_files.check(path, channels=2)
  with pytest.raises(audio_files.AudioFault, match='wrong number of channels'):
    list(audio_files.segments(path, 1.0, 24000, 2))


def test_channels_that_cancel_are_silent_as_one_and_not_as_two(tmp_path):
  path = write(tmp_path / 'a.wav', tone()[:, None] * [1, -1])
  with pytest.raises(audio_files.AudioFault, match='silent'):
    audio_files.check(path)
  assert audio_files.check(path, channels=2).peak == pytest.approx(0.5, abs=1e-3)


def test_sixteen_bits_at_24_kilohertz_are_untouched(tmp_path):
  pcm = np.random.default_rng(0).integers(-32768, 32767, 30000).astype(np.int16)
  soundfile.write(tmp_path / 'a.flac', pcm, 24000)
  np.testing.assert_array_equal(audio_files.read(tmp_path / 'a.flac'), pcm.astype(np.float32) / 32768)


@pytest.mark.parametrize('rate', [24000, 44100])
def test_segments_join_without_a_seam(tmp_path, rate):
  path = write(tmp_path / 'a.wav', np.random.default_rng(0).normal(0, 0.1, round(7.3 * rate)), rate)
  pieces = list(audio_files.segments(path, 2.0))
  assert [len(p) for p in pieces[:-1]] == [48000] * 3 and 0 < len(pieces[-1]) < 48000
  np.testing.assert_array_equal(np.concatenate(pieces), audio_files.read(path))
  np.testing.assert_array_equal(audio_files.read(path, max_seconds=0.5), audio_files.read(path)[:12000])


def test_memory_is_bounded_for_a_long_file(tmp_path):
  """Five minutes at 48 kHz stereo are 115 MB as floats; reading them in pieces may take a fifth of that."""
  path = tmp_path / 'long.wav'
  with soundfile.SoundFile(path, 'w', 48000, 2, 'PCM_16') as file:
    for _ in range(30):
      file.write(np.zeros((48000 * 10, 2), np.int16) + 500)
  sum(len(p) for p in audio_files.segments(write(tmp_path / 'warm.wav', tone(rate=48000), 48000), 1.0))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert audio_files.check(path).seconds == 300
  assert sum(len(p) for p in audio_files.segments(path, 30.0)) == 300 * 24000
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 23_000  # kB


def cut(path, share=2 / 3):
  content = path.read_bytes()
  path.write_bytes(content[:int(len(content) * share)])
  return path


def faulty_files(folder):
  """(reason, path) of each kind of fault."""
  noise = np.random.default_rng(0).normal(0, 0.1, 72000)
  for extension in (*FORMATS, 'aiff'):
    yield 'truncated', cut(write(folder / f'cut.{extension}', noise, 48000))
  yield 'empty', write(folder / 'none.wav', noise[:0])
  (folder / 'nothing.flac').write_bytes(b'')
  yield 'empty', folder / 'nothing.flac'
  (folder / 'text.wav').write_bytes(b'this is no music ' * 100)
  yield 'unreadable', folder / 'text.wav'
  yield 'silent', write(folder / 'silent.flac', noise * 0)
  yield 'too short', write(folder / 'short.ogg', noise[:12000])
  for name, value in (('nan', np.nan), ('inf', np.inf)):
    spoilt = np.where(np.arange(72000) == 7000, value, noise)
    yield 'non-finite', write(folder / f'{name}.wav', spoilt, subtype='FLOAT')
  yield 'out of range', write(folder / 'scale.wav', noise * 32768, subtype='FLOAT')


def test_faults_have_reasons(tmp_path):
  for reason, path in faulty_files(tmp_path):
    with pytest.raises(audio_files.AudioFault) as fault:
      audio_files.check(path)
    assert fault.value.reason == reason, path
    again = pickle.loads(pickle.dumps(fault.value))
    assert (again.reason, str(again)) == (reason, str(fault.value))


def test_a_header_that_does_not_know_its_length_is_no_fault(tmp_path):
  """Programs that write to a pipe leave 0xFFFFFFFF as the size."""
  path = write(tmp_path / 'piped.wav', tone())
  content = bytearray(path.read_bytes())
  at = content.index(b'data') + 4
  content[at:at + 4] = b'\xff\xff\xff\xff'
  path.write_bytes(content)
  assert audio_files.check(path).seconds == 2.0
  path = write(tmp_path / 'piped.flac', tone())
  content = bytearray(path.read_bytes())
  at = content.index(b'fLaC') + 8 + 13  # the last four bits before the low word of the count, then that word
  content[at] &= 0xf0
  content[at + 1:at + 5] = bytes(4)
  path.write_bytes(content)
  assert soundfile.info(path).frames > 1 << 60
  assert audio_files.check(path).seconds == 2.0
  assert signal_to_noise(audio_files.read(path), tone()) > 80


def test_names_need_not_be_unicode(tmp_path):
  path = bytes(tmp_path) + b'/caf\xe9.wav'
  write(path, tone())
  assert audio_files.check(path).seconds == 2.0


def test_written_wav_is_sixteen_bit_and_clipped(tmp_path):
  path = tmp_path / 'a.wav'
  audio_files.write_wav(path, np.array([0.0, 0.5, -0.5, 3.0, -3.0], np.float32))
  assert soundfile.info(path).subtype == 'PCM_16'
  np.testing.assert_allclose(audio_files.read(path), [0, 0.5, -0.5, 1, -1], atol=1e-4)
  with pytest.raises(ValueError, match='no numbers'):
    audio_files.write_wav(path, np.array([np.nan]))
