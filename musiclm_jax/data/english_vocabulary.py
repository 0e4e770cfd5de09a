"""Makes `text/english.model`, the built-in vocabulary: `python -m musiclm_jax.data.english_vocabulary`.

The sentences are training texts of the composer, so that its phrases are short, and a list of common English
and music words, so that what people type is too. No text of a test split is used.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
import pathlib
import re

from musiclm_jax.data import composer
from musiclm_jax.text import tokenizer

VOCAB_SIZE = 2000
_PIECES = 600  # composer pieces whose training texts are read
_SEED = 7  # music that no experiment trains on

_COMMON = """
a about above across after again against all almost alone along also always am among an and another any
anyone anything are area around as ask at away back bad be beautiful because become been before begin behind
being below best better between big black blue both break bring brother build but by call came can car carry
cat catch child city clear close cold color come could country cross cut day dear deep did different do does
dog done door down drive each early earth east easy eat end enough even evening ever every everyone
everything eye face fall family far father feel feeling feet few field fight fill final find fine fire first
five fly follow food for found four free friend from front full game garden gave get girl give glad go gold
gone good great green ground group grow had half hand happen hard has have he head hear heard heart heat
help her here high him his hold home hope horse hot hour house how however hundred i idea if in inside
instead into is it its just keep kind king knew know lady land large last late later laugh lead learn leave
left less let life light like little live long look lost lot love low made main make man many maybe me mean
men middle might mind minute modern moment money moon more morning most mother mountain move movie much must
my name near need never new next nice night no none north not nothing now number of off often old on once
one only open or other our out outside over own part party people perfect person picture place plain plan
play played player playing please point power quite rain read ready real red rest rich right ring rise river
road rock room round run sad said same saw say school sea season second see seem self send set seven several
shall she ship short should show side simple sing since sit six sky sleep slow small smile snow so some
someone something sometimes soon south space speak spring stand star start still stone stop story street
strong such summer sun sure sweet take talk tell ten than that the their them then there these they thing
think this those three through time to today together told too took top toward town travel tree true try
turn two under until up upon us use very wait wake walk wall want war warm was watch water way we week well
went were west what when where which while white who whole why wide wild will wind window winter with within
without woman women wonder wood word work world would year yellow yes yet you young your
"""
_MUSIC = """
accordion acoustic aggressive album alto ambient anthem arrangement artist atmosphere audio backing ballad
band banjo bar baroque bass bassline bassoon beat beats bell blues bossa bouncy bow bpm bridge bright cello
chamber chant chill choir chord chords chorus cinematic clap clarinet classical club composer concert
country crash crescendo crisp cymbal dance dancing danceable dark delay delicate disco distorted distortion
dramatic dreamy drone drum drummer drumming drums duet dub echo eerie effects electric electro electronic
emotional energetic energy ensemble epic ethereal ethnic exciting experimental fade fast female festival
fiddle film flamenco flute folk funk funky fuzzy genre gentle groove groovy guitar guitars hall happy
harmonic harmonica harmonies harmony harp harpsichord haunting heavy hip hop house hum hypnotic improvised
indie industrial instrument instrumental instruments intense intro jazz jazzy joy joyful key keyboard kick
latin layered lead live lively lo fi loop loud lullaby lyrics major male mallet march marimba mellow
melancholic melancholy melodic melody metal meter minimal minor mix mood mournful movement music musical
musician mute noise noisy notes oboe ocean octave opera orchestra orchestral organ outro pad passionate
peaceful percussion percussive performance phrase pianist piano piece pitch plucked pop powerful producer
progression psychedelic pulse pulsing punchy punk quartet quiet rap reggae relaxing repetitive resonant
reverb rhythm rhythmic riff romantic salsa sample saxophone scale score section sentimental sequence shaker
shimmering singer singing sitar ska sitting smooth snare soft solo sombre song songs sonata soothing soprano
soul soulful sound sounds soundtrack spacious staccato steady strings strum strummed strumming style
suspenseful sustained swing symphony synth synthesizer syncopated tambourine tango techno tempo tense
tension texture timbre timpani tom tone track traditional trance trap tremolo triangle trombone trumpet tuba
tune ukulele upbeat uplifting verse vibrant vibraphone vibrato video vintage viola violin vocal vocals
vocalist voice voices waltz wind wobble woodwind xylophone
"""
_CHARACTERS = '0 1 2 3 4 5 6 7 8 9 . , : ; ! ? - / & # ( ) " \' + * % @ _ = j q x z'


def sentences() -> Iterator[str]:
  """What the vocabulary is trained on, in order."""
  corpus = composer.Corpus(seed=_SEED, size=_PIECES)
  for i in range(len(corpus)):
    for said in composer.texts(corpus.score(i), 'train'):
      yield said['text']
  # The synonyms of the held-out split are words of the language too; without them they would be spelt in
  # letters, and that split would measure spelling.
  phrases = ' '.join((*composer.phrases('train'), *composer.phrases('synonyms')))
  templates = re.sub(r'\{\w+\}|[.,:;]', ' ', ' '.join(composer.templates('train')))
  for word in (_COMMON + _MUSIC + phrases + ' ' + templates.lower()).split():
    # SentencePiece takes pieces from what it sees in two different strings, hence the variants.
    yield from (word, f'{word},', f'{word}.')
  yield from _CHARACTERS.split()


def main() -> None:
  parser = argparse.ArgumentParser(description='Builds the built-in vocabulary.')
  default = pathlib.Path(tokenizer.__file__).with_name('english.model')
  parser.add_argument('--output', type=pathlib.Path, default=default)
  output = parser.parse_args().output
  built = tokenizer.Tokenizer.train(sentences(), VOCAB_SIZE)
  output.write_bytes(built.model_bytes)
  print(f'{output}: {built!r}')


if __name__ == '__main__':
  main()
