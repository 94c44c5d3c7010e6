# ViT-AC on the laptop set, 0.52 M parameters: the baseline of config/hope_jump.py, trained on the same clips as
# they are, for TTA. With --world=True --worlds=True it has HOPE's world head, and learns in made-up worlds, too.
# Needs two CPU cores and 1 GB of memory, takes about 4 minutes there. With --max_iters=4000 expect a loss of
# 0.014 in A, where HOPE has 0.009.
model = 'vit'
world = False
worlds = False
conv = False
depth = 4
width = 96
heads = 4
mlp_hidden = 384
out = 'out/vit.pt'
