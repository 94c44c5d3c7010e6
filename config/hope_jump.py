# AC-HOPE-ViT on the laptop set, 0.52 M parameters: in each block attention, then Titan memory, then CMS.
# Needs two CPU cores and 1 GB of memory, takes 6 minutes there. Prepares data/slide first if it is missing (1 minute).
model = 'hope'
mixer = 'both'
depth = 2
width = 96
heads = 4
cms_hidden = 236
out = 'out/hope.pt'
