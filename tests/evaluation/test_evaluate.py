"""The report as a whole: what stands in the way of one section leaves the others."""
import json

import pytest

from musiclm_jax import evaluate
from tests.trainings import write_signals


def test_a_section_that_cannot_be_measured_leaves_the_others_and_is_an_error(tmp_path, monkeypatch):
  def missing(measure):
    raise FileNotFoundError('no networks')

  write_signals(tmp_path / evaluate.RECORDS)
  monkeypatch.setattr(evaluate._Measure, 'generation', missing)  # signals have nothing to prompt for
  evaluate.evaluate(tmp_path)  # nothing is trained: nothing is measured, which is no error
  before = json.loads((tmp_path / 'report.json').read_text())
  assert all('was not measured' in note for note in before['notes'])

  def refused(measure):
    raise ValueError('stages were trained on tokens of other networks')

  monkeypatch.setattr(evaluate._Measure, 'stages', refused)
  monkeypatch.setattr(evaluate._Measure, 'codec', lambda measure: ({'mel_distance': 0.5}, []))
  with pytest.raises(ValueError, match='stages was not measured: .* other networks .the report has the other sections'):
    evaluate.evaluate(tmp_path)
  assert json.loads((tmp_path / 'report.json').read_text())['codec'] == {'mel_distance': 0.5}
