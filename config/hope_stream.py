# Streams of worlds: trains the HOPE of config/hope_jump.py further, on streams of 4 clips with one action gain each. The
# Titan memory is carried along, the CMS levels are written after every clip. Needs out/hope.pt; 6 minutes on one CPU core.
model = 'hope'
mixer = 'both'
cms_hidden = 236
init_from = 'out/hope.pt'
stream = 4
stream_from = 0.0
action_gain = 0.7
cms_rate = 10.0
lambda_start = 0.8
max_iters = 300
learning_rate = 5e-4
warmup = 0.1
out = 'out/hope_stream.pt'
