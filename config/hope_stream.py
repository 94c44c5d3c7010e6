# Streams of worlds: the HOPE of config/hope_jump.py goes on learning on streams of 4 clips with one action gain each, the
# Titan memory carried along and the CMS levels written after every clip. Needs out/hope.pt; took 6 minutes on one CPU core.
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
