# The report: 5 seeds of each model, 5 orders of the clips, for each method, with intervals. Needs five seeds of
# HOPE, ViT-AC and oracle; docs/results.md has the loop that trains them. Takes 21 minutes on two cores.
# Expect HOPE's world head to close 90 % of the gap, LN-TTA on the ViT-AC 77 %, with five steps a clip 83 %.
ckpt = ('out/hope_1.pt, out/hope_2.pt, out/hope_3.pt, out/hope_4.pt, out/hope_5.pt, '
        'out/vit_1.pt, out/vit_2.pt, out/vit_3.pt, out/vit_4.pt, out/vit_5.pt')
oracle = 'out/oracle_1.pt, out/oracle_2.pt, out/oracle_3.pt, out/oracle_4.pt, out/oracle_5.pt'
methods = 'frozen, LN-TTA, ViT-AC LN-TTA x5, world head'
streams = 5
probe_every = 200
out = 'out/report'
