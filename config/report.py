# The report: 3 seeds of each model for each method, with intervals. Needs three seeds of HOPE,
# ViT-AC and oracle; docs/results.md has the loop that trains them.
# Expect HOPE's world head to close 89 % of the gap, LN-TTA on the ViT-AC 74 %, with five steps a clip 82 %.
ckpt = 'out/hope_1.pt, out/hope_2.pt, out/hope_3.pt, out/vit_1.pt, out/vit_2.pt, out/vit_3.pt'
oracle = 'out/oracle_1.pt, out/oracle_2.pt, out/oracle_3.pt'
methods = 'frozen, LN-TTA, LN-TTA x5, world head'
streams = 1
probe_every = 200
out = 'out/report'
