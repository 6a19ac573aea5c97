"""Teach a classifier labels of one's own: `imagemesh finetune`, built of these parts."""
