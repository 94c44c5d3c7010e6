# The report on data/mujoco, a real engine with features of a pretrained network: three seeds of HOPE, ViT-AC
# and oracle, whose commands are in docs/own_data.md. The shift is given: --phases=A,wind,A --out=out/mj_wind
data = 'mujoco'
ckpt = 'out/mj_hope_1.pt, out/mj_hope_2.pt, out/mj_hope_3.pt, out/mj_vit_1.pt, out/mj_vit_2.pt, out/mj_vit_3.pt'
methods = 'frozen, LN-TTA, world head'
clips = 100
probe_clips = 40
probe_every = 100
out = 'out/mj_B'
