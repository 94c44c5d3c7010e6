# AC-HOPE-ViT on the laptop set, 0.45 M parameters.
# Needs two CPU cores and 1 GB of memory; takes 8 minutes there. Prepares data/slide first if it is missing.
model = 'hope'
depth = 2
width = 96
heads = 4
cms_hidden = 300
out = 'out/hope.pt'
