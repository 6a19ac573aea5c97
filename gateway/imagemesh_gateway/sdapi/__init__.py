"""AUTOMATIC1111's and SD.Next's API, ``/sdapi/v1`` and ``/controlnet``, so that their clients work unchanged."""
