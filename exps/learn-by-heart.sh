#!/usr/bin/env bash
# Can the whole way learn anything? Toy models, one of each kind, learn captions and pictures by heart and draw them
# again, greedily. Fails unless every code is the one that was learned. On CPU; exps/quickstart.sh, whose data it takes,
# ends with it.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v torchrun > /dev/null || source exps/setup.sh train,plot

OUT=${OUT:-output/quickstart}
EXAMPLES=configs/data_configs/train_data_examples
DRAWINGS=configs/data_configs/unitoken_examples/drawings.json
CHAMELEON=checkpoints/chameleon_small
HEART=$OUT/by-heart
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
learn=(python training/train.py --stage II --precision fp32 --num_workers 0 --warmup_epochs 5
  --wd 0 --log_interval 25 --save_iteration_interval 1000)
draw=(python training/generate.py --greedy --guidance 1 --precision fp32 --overwrite)
record() { # of token files in $1
  python pre_tokenize/concat_record.py --sub_record_dir "$1" --save_path "$1/record.json"
  printf 'META:\n  - path: %s\n' "$(realpath "$1/record.json")" > "$1/data.yaml"
}

echo "-- UniToken, pictures of 128 x 128"
unitoken=$HEART/unitoken
python pre_tokenize/pre_tokenize.py --in_filename $DRAWINGS --out_dir "$unitoken/tokens" --target_size 128 \
  --image_dir $EXAMPLES --tokenizer_dir $CHAMELEON
record "$unitoken/tokens"
python training/toy_model.py --tokenizer $CHAMELEON --output_dir "$unitoken/toy"
"${learn[@]}" --variant base --init_from "$unitoken/toy/llm" --vit_from "$unitoken/toy/siglip" --unmask_image_logits \
  --data_config "$unitoken/tokens/data.yaml" --output_dir "$unitoken/run" --epochs 100 --lr 5e-3 --dropout 0 --batch_size 4
"${draw[@]}" --model "$unitoken/run" --tokenizer_dir $CHAMELEON --prompts $DRAWINGS --image_dir $EXAMPLES \
  --target_size 128 --height 128 --width 128 --out "$unitoken/drawn"
python exps/compare_drawn.py --record "$unitoken/tokens/record.json" --answers "$unitoken/drawn" \
  --tokenizer_dir $CHAMELEON

echo "-- ILLUME's way: a language model with DualViTok's words, pictures of 128 x 128"
lm=$HEART/lm
config=configs/example/dualvitok/dualvitok_small.py
pictures=(--model_config $config --tokenizer_checkpoint checkpoints/dualvitok_small)
python vision_tokenizer/tokenizer/tokenizer_codebook_inference.py --data_config "$OUT/data_config.json" \
  --datasets examples_generation --resolution_type fixed --resolution 128 "${pictures[@]}"
codes=$OUT/codes/examples_generation/jsonl_after_tokenizer/dualvitok/fixed_128/0000.jsonl
python training/toy_model.py --output_dir "$lm/bytes"
python pre_tokenize/extend_tokenizer.py --tokenizer_dir "$lm/bytes/lm" --output_dir "$lm/words" \
  --semantic_size 4096 --pixel_size 32768
python training/toy_model.py --tokenizer "$lm/words" --output_dir "$lm/toy"
python pre_tokenize/pre_tokenize.py --image_tokenizer dualvitok --tokenizer_dir "$lm/words" --in_filename "$codes" \
  --out_dir "$lm/tokens"
record "$lm/tokens"
"${learn[@]}" --variant lm --init_from "$lm/toy/lm" --data_config "$lm/tokens/data.yaml" --output_dir "$lm/run" \
  --epochs 90 --lr 5e-3 --min_lr 3e-3 --clip_grad 1 --batch_size 5
"${draw[@]}" --model "$lm/run" --prompts "$codes" --out "$lm/drawn" "${pictures[@]}" \
  --image_dir $EXAMPLES/examples_generation/images
python exps/compare_drawn.py --record "$lm/tokens/record.json" --answers "$lm/drawn" --tokenizer_dir "$lm/words" \
  "${pictures[@]}"
