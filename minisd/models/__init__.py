"""What has weights: tensors in, tensors out; no file, no choice of device."""
