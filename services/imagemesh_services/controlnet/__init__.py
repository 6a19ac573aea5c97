"""The ControlNet service: a picture to follow in, residuals for the UNet out."""
