# ViT-AC with the older second loss: two steps of rollout (T = 2, as in V-JEPA 2-AC) in place of the jump.
# Needs two CPU cores and 1 GB of memory. Evaluation rolls out all seven steps and scores the last three.
model = 'vit'
world = False
conv = False
loss = 'rollout'
rollout_steps = 2
depth = 4
out = 'out/vit_rollout.pt'
