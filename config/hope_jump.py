# AC-HOPE-ViT on the laptop set, 0.45 M parameters and a world head of 0.14 M: in each block attention, then
# Titan memory, then CMS. Takes 2 to 6 minutes on two CPU cores and 1.4 GB of memory, and one or two minutes
# more if data/slide is missing. Expect a jump loss of 0.014 on val; with --max_iters=4000, 0.008.
model = 'hope'
mixer = 'both'
depth = 2
width = 96
heads = 4
cms_hidden = 236
learning_rate = 4e-3
max_iters = 1000
out = 'out/hope.pt'
