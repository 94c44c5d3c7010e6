#!/usr/bin/env bash
# Trains every variant with three seeds, runs A→B→A with each and prints one table: bash ablate.sh
# 20 variants, three trainings each; configs say how long one takes. Further options go to train.py:
# bash ablate.sh --max_iters=1000
# What is finished is kept, so an interrupted table goes on where it stopped. Other options want another out.
set -euo pipefail
out=out/ablation
seeds='1 2 3'
# Checkpoints of oracles, one a seed, separated by commas: they add the share of the gap that is closed.
oracle=''

# A variant a line: its name, the method by which it adapts (_ is a blank), its config, options for train.py.
while read -r name method config options; do
    checkpoints=''
    for seed in $seeds; do
        file=$out/${name}_$seed.pt
        resume=$([ ! -e "$file" ] || echo --resume)
        python train.py config/$config.py --max_iters=2500 $options "$@" --seed=$seed --out=$file $resume
        checkpoints+=${checkpoints:+,}$file
    done
    python adapt.py --ckpt=$checkpoints --oracle="$oracle" --methods="frozen,${method//_/ }" --out=$out/$name
done <<'VARIANTS'
HOPE                       world_head hope_jump
ViT-AC                     LN-TTA     vit_jump
ViT-AC_head                world_head vit_jump  --world=True --worlds=True
ViT-AC_head_convolution    world_head vit_jump  --world=True --worlds=True --conv=True
ViT-AC_convolution         LN-TTA     vit_jump  --conv=True
ViT-AC_made-up_worlds      LN-TTA     vit_jump  --worlds=True
no_convolution             world_head hope_jump --conv=False
no_made-up_worlds          world_head hope_jump --plain_worlds=1
gains_below_1.4            world_head hope_jump --world_gain=0.33
no_zoomed_clips            world_head hope_jump --zoom=False
delta_rule                 world_head hope_jump --rule=delta
no_own_targets             world_head hope_jump --self_targets=False
no_surprise_gate           world_head hope_jump --surprise=False
one_CMS_level              world_head hope_jump --cms_periods=(1,) --cms_hidden=708
Hope-Attention             world_head hope_jump --mixer=attention --cms_hidden=300
Titan_without_attention    world_head hope_jump --mixer=titan --cms_hidden=300
HOPE_without_head          LN-TTA     hope_jump --world=False --worlds=False
HOPE_rollout               LN-TTA     hope_jump --world=False --loss=rollout
ViT-AC_rollout             LN-TTA     vit_rollout
paper CMS hope_jump --world=False --worlds=False --mixer=titan --memory_hidden=24 --conv=False --cms_hidden=300
VARIANTS

python - $out/*/figures.csv <<'TABLE'
import sys, pandas
lines = pandas.concat(map(pandas.read_csv, sys.argv[1:]))
means = lines.pivot_table('value', ['run', 'row'], 'figure', sort=False)
figures = ['phase 1', 'phase 2', 'B_first', 'return_cost', 'gap_closed', 'way_back']
print(means.filter(figures).round(4).to_string())
TABLE
