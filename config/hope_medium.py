# AC-HOPE-ViT between laptop and full size: 5.4 M parameters, for own clips of 8 steps x 256 patches x 1024.
#   python prepare.py --name=mine --source=clips --split=train:17000-21999,B:22000-22999,A2:23000-23999
# The laptop's HOPE made larger. A night: a step takes 7.5 s on one thread of an Intel Xeon, so 4,000 take 8
# hours, and 3.2 GB of memory.
# Not trained to the end yet, and not tried on a GPU, which needs no accumulation: --accumulation=1.
model = 'hope'
mixer = 'both'
data = 'mine'
depth = 4
width = 256
heads = 8
cms_hidden = 400
batch_size = 32
accumulation = 2
teacher_every = 16
stream_clips = 16
# 256, as on the laptop, would read a gigabyte a step. So a step reads 32 + 32 clips, 270 MB.
inverse_batch = 32
max_iters = 4000
learning_rate = 1e-3
eval_clips = 64
out = 'out/hope_medium.pt'
