#!/usr/bin/env bash
# The tokenizers of checkpoints/ again, from Debian's photograph packages to weights: some two hours of one CPU core.
# Prints first what it downloads, and under which licence. Needs Debian or Ubuntu (apt-get download, no root).
#   OUT=output/small-tokenizer bash exps/train-small-tokenizer.sh      interrupted, it goes on where it was
set -euo pipefail
source "$(dirname "$0")/setup.sh" train,plot,lite0
OUT=${OUT:-output/small-tokenizer}
PHOTOS=${PHOTOS:-$OUT/photographs}
HELD_OUT=${HELD_OUT:-configs/data_configs/train_data_examples}
DUALVITOK=configs/example/dualvitok/dualvitok_small.py
CHAMELEON=configs/example/chameleon_small.py
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
step() { printf '\n== %s\n' "$*"; }
train() { python vision_tokenizer/tokenizer/train_dualvitok.py "$@" --data_path="$PHOTOS" --eval_path="$HELD_OUT"; }
# the second stage: whole pictures at 256 x 256, codebooks put where the features are, the rate falling to nothing
second=(--fit_codebooks=kmeans --data_args.resolution=256 "--data_args.crop_share=(0.6, 1.0)" --global_batch_size=3
  --lr=7e-4 --lr_decay_style=cosine --lr_decay_ratio=0.03 --init_from_ema=True --ckpt_every=100)

step "photographs to learn from; the shipped examples are not among them"
[ -d "$PHOTOS" ] || python exps/collect_photographs.py --out "$PHOTOS"

step "a small ViT learns from EfficientNet-Lite0, then it is frozen"
[ -f "$OUT/vit.safetensors" ] ||
  python -m vision_tokenizer.fitting.teach_vit --config $DUALVITOK --data_path "$PHOTOS" --out "$OUT/vit.safetensors"

step "DualViTok: crops of 128, then pictures of 256"
train $DUALVITOK --results_dir="$OUT/first" --vit_checkpoint="$OUT/vit.safetensors"
train $DUALVITOK --results_dir="$OUT/second" "${second[@]}" --max_steps=500 \
  --init_from="$OUT/first/DualViTok/checkpoints/0001200.pt"
python -m vision_tokenizer.fitting.export --use_ema --out "$OUT/dualvitok_small" \
  --checkpoint "$OUT/second/DualViTok/checkpoints/0000500.pt"

step "Chameleon's VQGAN: a linear autoencoder, then its decoder learns"
train $CHAMELEON --results_dir="$OUT/vqgan"
python -m vision_tokenizer.models.chameleon.untrained --out "$OUT/chameleon_small" # for its text_tokenizer.json
python -m vision_tokenizer.fitting.export --use_ema --out "$OUT/chameleon_small" \
  --checkpoint "$OUT/vqgan/ChameleonVQGAN/checkpoints/0003000.pt"

step "how good they are on pictures they never saw"
python vision_tokenizer/tokenizer/evaluate_tokenizer.py --images "$HELD_OUT" --out_dir "$OUT/evaluation/dualvitok" \
  --model_config $DUALVITOK --tokenizer_checkpoint "$OUT/dualvitok_small"
python vision_tokenizer/tokenizer/evaluate_tokenizer.py --images "$HELD_OUT" --out_dir "$OUT/evaluation/chameleon" \
  --chameleon "$OUT/chameleon_small" --compare "$OUT/evaluation/dualvitok"
