# Titan + CMS as in the paper, at the size of config/hope_medium.py: a Titan memory of two layers in place of
# attention, written by DGD, a CMS, no world head and no convolution. It adapts by adapt.py's `Titan memory`
# and `CMS`. Needs own clips as config/hope_medium.py does. A step takes 7.1 s on one thread of an Intel Xeon, so
# 4,000 take 8 hours, and 3.7 GB of memory.
model = 'hope'
mixer = 'titan'
memory_hidden = 32
conv = False
world = False
worlds = False
data = 'mine'
depth = 4
width = 256
heads = 8
cms_hidden = 576
batch_size = 32
accumulation = 2
teacher_every = 16
max_iters = 4000
learning_rate = 1e-3
eval_clips = 64
out = 'out/paper_medium.pt'
