"""Where x starts, and what the UNet is told besides x and t."""
