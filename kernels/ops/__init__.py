"""The Triton kernels; they know no model.

attention.py   flash attention for any head width
group_norm.py  GroupNorm and SiLU in either layout, with a sum in front
layer_norm.py  LayerNorm, with a sum in front
geglu.py       GEGLU
launch.py      which tensors they take, and their tile sizes
"""
