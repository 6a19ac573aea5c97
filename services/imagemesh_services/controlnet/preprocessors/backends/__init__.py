"""What runs the models that preprocessors need."""
