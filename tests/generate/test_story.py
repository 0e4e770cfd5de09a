import hypothesis
from hypothesis import strategies as st
import pytest

from musiclm_jax.generate import story
from musiclm_jax.generate.story import Story


def test_entries_with_commas_of_their_own():
  found = story.parse('0:00 calm piano, soft and slow, 0:15 add drums; 1:02.5  strings\n1:00:00 the end')
  assert found.entries == ((0, 'calm piano, soft and slow'), (15, 'add drums'), (62.5, 'strings'), (3600, 'the end'))


@hypothesis.given(st.lists(st.integers(1, 7000), unique=True, max_size=5))
def test_what_is_written_is_read(times):
  entries = tuple((float(t), f'text {t}') for t in [0, *sorted(times)])
  text = ', '.join(f'{int(t) // 3600}:{int(t) // 60 % 60:02}:{int(t) % 60:02} {words}' for t, words in entries)
  assert story.parse(text).entries == entries


def test_a_file_is_read(tmp_path):
  (tmp_path / 'story.txt').write_text('0:00 calm\n0:10 loud\n')
  assert story.read(str(tmp_path / 'story.txt')).entries == ((0, 'calm'), (10, 'loud'))
  with pytest.raises(FileNotFoundError):
    story.read(str(tmp_path / 'nothing.txt'))


@pytest.mark.parametrize('text, words', [
    ('', 'no text'), ('calm piano', 'no time before'), ('calm, 0:10 loud', 'no time before'),
    ('0:05 calm', 'must begin at 0:00'), ('0:00 a, 0:20 b, 0:10 c', 'must ascend'),
    ('0:00 a, 0:00 b', 'must ascend'),
    ('0:00 calm, 0:10', 'no text at 0:10'), ('0:00 , 0:10 loud', 'no text at 0:00'), ('0:00 a, 0:75 b', 'is no time'),
    ('0:00 a, 0:1x b', 'is no time'), ('0:00 a, -0:10 b', 'is no time'), ('0:00 a, 1:99:00 b', 'is no time'),
    ('0:00 calm 0:15 drums', 'comma before a time'),
])
def test_malformed_stories_are_told_in_a_line(text, words):
  with pytest.raises(ValueError, match=words) as raised:
    story.parse(text)
  assert '\n' not in str(raised.value)


def test_a_story_longer_than_the_music_or_its_cross_fades_is_refused():
  found = story.parse('0:00 a, 0:10 b')
  found.check(10.1)
  with pytest.raises(ValueError, match='more seconds'):
    found.check(10.0)
  with pytest.raises(ValueError, match='does not fit between 0:00 and 0:10'):
    Story(found.entries, crossfade=10.5)


@pytest.mark.parametrize('text, seconds', [('0:12', 12), ('12', 12), ('12.5', 12.5), ('1:00:05.5', 3605.5)])
def test_times(text, seconds):
  assert story.parse_time(text) == seconds


@pytest.mark.parametrize('text', ['', '-3', 'nan', '1:2', '1:60', 'x', '1e3', '::', '0:00:00:00'])
def test_what_is_no_time(text):
  with pytest.raises(ValueError, match='is no time'):
    story.parse_time(text)
