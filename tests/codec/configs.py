"""The smallest codec that has every part: shared by the tests of this folder."""
import dataclasses

from musiclm_jax.codec import discriminators, model, objective

CODEC = model.SoundStreamConfig(
    patch=4, widths=(4, 6, 8), strides=(3, 4), latent=6, levels=3, codebook_size=8,
    dilations=(1, 3), kernel=3)
DISCRIMINATORS = discriminators.DiscriminatorsConfig(
    width=2, window=64, hop=32, kernel=3, multipliers=(1, 2), strides=((1, 2), (2, 2)))
TRAINING = objective.CodecTraining(
    codec=CODEC, discriminators=DISCRIMINATORS, weights=objective.LossWeights(waveform=1.0), seconds=0.01,
    batch_size=4, windows=(32, 64), bands=8)

replace = dataclasses.replace
