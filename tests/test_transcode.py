"""Recordings through the codec: blocks join without a seam, lengths are exact, and nothing wrong passes."""
import dataclasses
import tracemalloc
import types

from flax import nnx
import numpy as np
import pytest
import soundfile

from musiclm_jax import transcode
from musiclm_jax.codec import model as soundstream
from musiclm_jax.codec.bitstream import BitstreamReader
from musiclm_jax.training import state as states
from tests.trainings import experiment, make_codec


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  return make_codec(tmp_path_factory.mktemp('runs'))


@pytest.fixture(scope='module')
def transcoder(run):
  made = transcode.Transcoder(transcode.load(run))
  made.block_frames = 30  # shorter than by default: tests have several blocks
  return made


def music(path, samples, *, rate=24000, channels=1, seed=0):
  noise = np.random.default_rng(seed).normal(0, 0.1, (samples, channels))
  soundfile.write(path, noise, rate, subtype='FLOAT')
  return path


@pytest.mark.parametrize('samples', [1, 480, 30 * 480 + 1, 75 * 480 - 7])
def test_blocks_join_and_lengths_are_exact(transcoder, tmp_path, samples):
  source = music(tmp_path / 'a.wav', samples)
  made = transcoder.encode(source, tmp_path / 'a.mlc')
  with open(tmp_path / 'a.mlc', 'rb') as file:
    reader = BitstreamReader(file, 'a.mlc')
    tokens = np.concatenate(list(reader))
  audio, _ = soundfile.read(source, dtype='float32')
  whole = np.zeros((1, -(-samples // 480) * 480), np.float32)
  whole[0, :samples] = audio
  model = transcoder.codec.model
  np.testing.assert_array_equal(tokens, states.compiled(model, 'encode')(whole)[0])
  assert reader.samples == samples and made.seconds == samples / 24000
  assert made.size == (tmp_path / 'a.mlc').stat().st_size
  transcoder.decode(tmp_path / 'a.mlc', tmp_path / 'b.wav')
  transcoder.round_trip(source, tmp_path / 'c.wav')
  assert (tmp_path / 'b.wav').read_bytes() == (tmp_path / 'c.wav').read_bytes()
  decoded, rate = soundfile.read(tmp_path / 'b.wav', dtype='float32')
  assert rate == 24000 and len(decoded) == samples
  heard = states.compiled(model, 'decode')(tokens[None])[0, :samples]
  np.testing.assert_allclose(decoded, np.clip(heard, -1, 1), atol=1e-4)


def test_any_number_of_levels(transcoder, tmp_path):
  source = music(tmp_path / 'a.wav', 20000)
  transcoder.encode(source, tmp_path / 'all.mlc')
  made = transcoder.encode(source, tmp_path / 'two.mlc', levels=2)
  config = transcoder.config
  assert made.bitrate == 2 * 50 * (config.codebook_size - 1).bit_length()
  transcoder.decode(tmp_path / 'all.mlc', tmp_path / 'a.wav', levels=2)
  transcoder.decode(tmp_path / 'two.mlc', tmp_path / 'b.wav')
  assert (tmp_path / 'a.wav').read_bytes() == (tmp_path / 'b.wav').read_bytes()
  with pytest.raises(ValueError, match='two.mlc has 2 levels; 3 were asked for'):
    transcoder.decode(tmp_path / 'two.mlc', tmp_path / 'b.wav', levels=3)
  with pytest.raises(ValueError, match=f'the codec has {config.levels} levels; 99 were asked for'):
    transcoder.encode(source, tmp_path / 'b.mlc', levels=99)


def test_other_rates_and_channels_are_taken(transcoder, tmp_path):
  made = transcoder.encode(music(tmp_path / 'a.wav', 44100, rate=44100, channels=2), tmp_path / 'a.mlc')
  assert made.seconds == pytest.approx(1.0, abs=1e-3)


def denoiser(half):
  """A stereo codec of which that half denoises, untrained."""
  objective = experiment('codec', **{
      'CODEC_CHANNELS': 2, 'model.SoundStreamConfig.denoise_at': half}).argument('objective')
  model = soundstream.SoundStream(objective.codec, rngs=nnx.Rngs(0))
  model.film.bias[...] = model.film.bias[...].at[1].set(1.0)
  return types.SimpleNamespace(model=model, content_hash='0123456789abcdef')


@pytest.fixture(scope='module')
def stereo():
  return denoiser('encoder')


def test_stereo_comes_back_as_stereo(stereo, tmp_path):
  transcoder = transcode.Transcoder(stereo)
  source = music(tmp_path / 'a.wav', 40000, channels=2)
  transcoder.encode(source, tmp_path / 'a.mlc')
  transcoder.decode(tmp_path / 'a.mlc', tmp_path / 'b.wav')
  transcoder.round_trip(source, tmp_path / 'c.wav')
  decoded, _ = soundfile.read(tmp_path / 'b.wav')
  assert decoded.shape == (40000, 2) and np.abs(decoded[:, 0] - decoded[:, 1]).max() > 1e-3
  assert (tmp_path / 'b.wav').read_bytes() == (tmp_path / 'c.wav').read_bytes()
  with pytest.raises(ValueError, match='d.wav: wrong number of channels: 6, where 2 are wanted'):
    transcoder.encode(music(tmp_path / 'd.wav', 4000, channels=6), tmp_path / 'd.mlc')
  transcoder.encode(music(tmp_path / 'mono.wav', 4000), tmp_path / 'd.mlc')


def test_noise_is_taken_out_where_asked_by_a_codec_that_can(stereo, transcoder, tmp_path):
  source = music(tmp_path / 'a.wav', 20000, channels=2)
  at_encoder, at_decoder = (transcode.Transcoder(c, denoise=True) for c in (stereo, denoiser('decoder')))
  transcode.Transcoder(stereo).encode(source, tmp_path / 'a.mlc')
  at_encoder.encode(source, tmp_path / 'b.mlc')
  assert (tmp_path / 'a.mlc').read_bytes() != (tmp_path / 'b.mlc').read_bytes()
  transcode.Transcoder(stereo).decode(tmp_path / 'a.mlc', tmp_path / 'a_out.wav')
  at_decoder.decode(tmp_path / 'a.mlc', tmp_path / 'b_out.wav')  # the same parameters but for the place
  assert (tmp_path / 'a_out.wav').read_bytes() != (tmp_path / 'b_out.wav').read_bytes()
  for denoises in (at_encoder, at_decoder):
    transcode.Transcoder(denoises.codec).round_trip(source, tmp_path / 'plain.wav')
    denoises.round_trip(source, tmp_path / 'clean.wav')
    assert (tmp_path / 'plain.wav').read_bytes() != (tmp_path / 'clean.wav').read_bytes()
  # The half that does not denoise would do as if it had not been asked to.
  with pytest.raises(ValueError, match='the encoder of this codec takes the noise out, not its decoder'):
    at_encoder.decode(tmp_path / 'b.mlc', tmp_path / 'c.wav')
  with pytest.raises(ValueError, match='denoise in `musiclm codec decode`'):
    at_decoder.encode(source, tmp_path / 'c.mlc')
  assert not (tmp_path / 'c.wav').exists() and not (tmp_path / 'c.mlc').exists()
  with pytest.raises(ValueError, match='this codec cannot take noise out'):
    transcode.Transcoder(transcoder.codec, denoise=True)


@pytest.mark.parametrize('samples', [np.zeros(9000), np.full(9000, 0.5), np.sign(np.sin(np.arange(9000)))])
def test_silence_direct_current_and_clipping(transcoder, tmp_path, samples):
  soundfile.write(tmp_path / 'a.wav', samples, 24000)
  transcoder.round_trip(tmp_path / 'a.wav', tmp_path / 'b.wav')
  decoded, _ = soundfile.read(tmp_path / 'b.wav')
  assert len(decoded) == 9000 and np.isfinite(decoded).all()


def test_sources_that_cannot_be_read_leave_the_target_as_it_was(transcoder, tmp_path):
  target = tmp_path / 'a.mlc'
  target.write_bytes(b'before')
  noise = np.full(40000, 0.1, np.float32)
  noise[39000] = np.nan
  soundfile.write(tmp_path / 'nan.wav', noise, 24000, subtype='FLOAT')
  soundfile.write(tmp_path / 'none.wav', np.zeros(0), 24000)
  (tmp_path / 'text.wav').write_text('no music')
  for name, message in (('nan', 'non-finite'), ('none', 'empty'), ('text', 'unreadable')):
    for run in (transcoder.encode, transcoder.round_trip):
      with pytest.raises(ValueError, match=f'{name}.wav: {message}'):
        run(tmp_path / f'{name}.wav', target)
  with pytest.raises(FileNotFoundError, match='nothing at'):
    transcoder.encode(tmp_path / 'nowhere.wav', target)
  assert target.read_bytes() == b'before' and not list(tmp_path.glob('.*'))


def test_another_codec_a_damaged_and_a_truncated_file(transcoder, tmp_path):
  target = tmp_path / 'a.mlc'
  transcoder.encode(music(tmp_path / 'a.wav', 40000), target)
  whole = target.read_bytes()
  other = transcode.Transcoder(dataclasses.replace(transcoder.codec, content_hash='another'))
  with pytest.raises(ValueError, match=f'encoded by codec {transcoder.codec.content_hash}, this is another'):
    other.decode(target, tmp_path / 'b.wav')
  target.write_bytes(whole[:-30] + bytes([whole[-30] ^ 1]) + whole[-29:])
  with pytest.raises(ValueError, match='a.mlc is damaged: the checksum of its block 2'):
    transcoder.decode(target, tmp_path / 'b.wav')
  target.write_bytes(whole[:-5])
  with pytest.raises(ValueError, match='a.mlc is truncated'):
    transcoder.decode(target, tmp_path / 'b.wav')
  assert not (tmp_path / 'b.wav').exists() and not list(tmp_path.glob('.*'))


def test_memory_does_not_grow_with_the_length(transcoder, tmp_path):
  peaks = []
  for minutes in (0.5, 2):
    source = music(tmp_path / 'a.wav', int(minutes * 60 * 24000))
    tracemalloc.start()
    transcoder.round_trip(source, tmp_path / 'b.wav')
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < peaks[0] + 2e6 < 60e6


@pytest.mark.slow
def test_three_hours(transcoder, tmp_path):
  samples = 3 * 3600 * 8000 + 1
  with soundfile.SoundFile(tmp_path / 'a.flac', 'w', 8000, 1, 'PCM_16') as file:
    minute = 0.3 * np.sin(2 * np.pi * 220 * np.arange(60 * 8000) / 8000)
    for _ in range(180):
      file.write(minute)
    file.write(np.zeros(1))
  made = transcoder.encode(tmp_path / 'a.flac', tmp_path / 'a.mlc')
  assert made.seconds == pytest.approx(samples / 8000, abs=1e-3)
  transcoder.decode(tmp_path / 'a.mlc', tmp_path / 'a.wav')
  assert soundfile.info(tmp_path / 'a.wav').frames == round(made.seconds * 24000)


def test_a_folder_with_a_codec_and_another_network(run, tmp_path):
  assert transcode.load(run.parent).content_hash == transcode.load(run).content_hash
  built = experiment('w2v_bert', RECORDS=run.parent / 'audio', NUM_STEPS=0, **{'partition.Partitioner.data': 1})
  built.build(workdir=str(tmp_path), dry_run=False)
  with pytest.raises(ValueError, match='holds a .*, not a codec'):
    transcode.load(tmp_path)
