# ViT-AC on the laptop set, 0.46 M parameters: the baseline of config/hope_jump.py, trained on the same clips
# as they are, for TTA. With --world=True --worlds=True it has HOPE's world head, and learns in made-up
# worlds, too. Needs a CPU core and 1 GB of memory, takes 7 to 15 minutes there. Expect a jump loss of
# 0.0063 on val.
model = 'vit'
world = False
worlds = False
conv = False
depth = 4
width = 96
heads = 4
mlp_hidden = 384
max_iters = 4000
out = 'out/vit.pt'
