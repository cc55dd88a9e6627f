"""Masked networks between two prunes: built, trained, evaluated, BatchNorm re-estimated.

With a validation split, rounds are judged and fine-tuning is stopped by it, and the test split is
used once, for the chosen round and the dense network: no choice depends on what is reported. The
metric on a fixed sample of training examples is measured as well; the gap is overfitting.
BatchNorm is re-estimated on images augmented as in training, because plain ones were harmful.
Side effects of a network that cannot be reproduced on several ranks are refused or warned about.
"""
