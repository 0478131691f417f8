#!/usr/bin/env bash
# Can the whole way learn anything? A toy model learns four captions and pictures by heart and draws them again,
# greedily. Fails unless every code is the one that was learned. On CPU; exps/quickstart.sh, of which it takes the
# tokenizers, ends with it.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun > /dev/null || source exps/setup.sh train,plot

OUT=${OUT:-output/quickstart}
EXAMPLES=configs/data_configs/train_data_examples
DRAWINGS=configs/data_configs/unitoken_examples/drawings.json
HEART=$OUT/by-heart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
learn=(python training/train.py --stage II --precision fp32 --num_workers 0 --batch_size 4 --warmup_epochs 5
  --wd 0 --log_interval 25 --save_iteration_interval 1000)
draw=(python training/generate.py --greedy --guidance 1 --precision fp32 --overwrite)
record() { # of token files in $1
  python pre_tokenize/concat_record.py --sub_record_dir "$1" --save_path "$1/record.json"
  printf 'META:\n  - path: %s\n' "$(realpath "$1/record.json")" > "$1/data.yaml"
}

echo "-- UniToken, pictures of 128 x 128"
unitoken=$HEART/unitoken
python pre_tokenize/pre_tokenize.py --in_filename $DRAWINGS --out_dir "$unitoken/tokens" --target_size 128 \
  --image_dir $EXAMPLES --tokenizer_dir "$OUT/tokenizer"
record "$unitoken/tokens"
python training/toy_model.py --tokenizer "$OUT/tokenizer" --output_dir "$unitoken/toy"
"${learn[@]}" --variant base --init_from "$unitoken/toy/llm" --vit_from "$unitoken/toy/siglip" --unmask_image_logits \
  --data_config "$unitoken/tokens/data.yaml" --output_dir "$unitoken/run" --epochs 100 --lr 5e-3 --dropout 0
"${draw[@]}" --model "$unitoken/run" --tokenizer_dir "$OUT/tokenizer" --prompts $DRAWINGS --image_dir $EXAMPLES \
  --target_size 128 --height 128 --width 128 --out "$unitoken/drawn"
python exps/compare_drawn.py --record "$unitoken/tokens/record.json" --answers "$unitoken/drawn" \
  --tokenizer_dir "$OUT/tokenizer"
