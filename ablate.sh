#!/usr/bin/env bash
# Trains every variant of HOPE with three seeds, runs A→B→A with each and prints one table: bash ablate.sh
# A training takes 13 minutes on one thread. Further options go to train.py: bash ablate.sh --max_iters=1000
# What is finished is kept, so an interrupted table goes on where it stopped. Other options want another out.
set -euo pipefail
out=out/ablation
seeds='1 2 3'
# Checkpoints of oracles, one a seed, separated by commas: they add the share of the gap that is closed.
oracle=''

# A variant a line: its name, the methods by which it adapts, its config, its options for train.py.
while read -r name methods config options; do
    checkpoints=''
    for seed in $seeds; do
        file=$out/${name}_$seed.pt
        resume=$([ ! -e "$file" ] || echo --resume)
        python train.py config/$config.py --max_iters=4000 $options "$@" --seed=$seed --out=$file $resume
        checkpoints+=${checkpoints:+,}$file
    done
    python adapt.py --ckpt=$checkpoints --oracle="$oracle" --methods=frozen,$methods --out=$out/$name
done <<'VARIANTS'
HOPE                     memory        hope_jump
ViT-AC                   LN-TTA,memory vit_jump
paper CMS hope_jump --action_memory=False --mixer=titan --memory_hidden=24 --conv=False --cms_hidden=300
Hope-Attention           memory        hope_jump --mixer=attention --cms_hidden=300
Titan_without_attention  memory        hope_jump --mixer=titan --cms_hidden=300
no_zoomed_clips          memory        hope_jump --zoom=False
delta_rule               memory        hope_jump --rule=delta
no_own_targets           memory        hope_jump --self_targets=False
no_surprise_gate         memory        hope_jump --surprise=False
no_convolution           memory        hope_jump --conv=False
one_CMS_level            memory        hope_jump --cms_periods=(1,) --cms_hidden=708
VARIANTS

python - $out/*/figures.csv <<'TABLE'
import sys, pandas
lines = pandas.concat(map(pandas.read_csv, sys.argv[1:]))
means = lines.pivot_table('value', ['run', 'row'], 'figure', sort=False)
print(means.filter(['A1', 'B', 'B_first', 'return_cost', 'gap_closed', 'way_back']).round(4).to_string())
TABLE
