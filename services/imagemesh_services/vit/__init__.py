"""The ViT service: what pictures show, and vectors that stand for them."""
