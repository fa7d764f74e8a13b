"""The UNet and the decoder, repacked around the kernels or around torch's functions.

unet.py     the UNet, and what it does otherwise than the readable one
blocks.py   the blocks that it and the decoder are made of
decoder.py  the VAE's decoder, and both together
steps.py    a denoise step of it, whole
graph.py    calls recorded as CUDA graphs
packed.py   weights in the order that the library wants
"""
