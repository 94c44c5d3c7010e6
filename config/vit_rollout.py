# ViT-AC with the older second loss: two steps of rollout (T = 2, as in V-JEPA 2-AC) in place of the jump.
# Needs a CPU core and 1 GB of memory, takes 6 minutes per 1,000 steps there. Expect a rollout loss of 0.0131 on
# val after 1,000. Evaluation rolls out all seven steps and scores the last three.
model = 'vit'
world = False
conv = False
loss = 'rollout'
rollout_steps = 2
depth = 4
out = 'out/vit_rollout.pt'
