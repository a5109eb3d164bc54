"""The model to train: where its folder is (no torch needed), and how it is loaded (in the training process)."""
