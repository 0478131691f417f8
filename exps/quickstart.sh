#!/usr/bin/env bash
# The whole way on the shipped photographs, on CPU, with the small trained tokenizers of checkpoints/: images -> codes ->
# pictures again; conversations -> token files -> stage I and II of a toy model. All in $OUT.
set -euo pipefail
source "$(dirname "$0")/setup.sh" train,plot
OUT=${OUT:-output/quickstart}
EXAMPLES=configs/data_configs/train_data_examples
DATA=$OUT/data_config.json
CONFIG=configs/example/dualvitok/dualvitok_small.py
CHAMELEON=checkpoints/chameleon_small
job=(--data_config "$DATA" --resolution_type fixed --resolution 256)
tokenizer=(--model_config $CONFIG --tokenizer_checkpoint checkpoints/dualvitok_small)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
step() { printf '\n== %s\n' "$*"; }

step "the example data, its codes to be written to $OUT/codes"
python - "$EXAMPLES/examples_meta_data_config.json" "$OUT" <<'PYTHON'
import json, pathlib, sys
source, out = map(pathlib.Path, sys.argv[1:])
datasets = json.loads(source.read_text())
for name, dataset in datasets.items():
    dataset |= {key: str(source.parent / dataset[key]) for key in ("image_dir", "annotation_dir")}
    dataset["root"] = str(out / "codes" / name)
out.mkdir(parents=True, exist_ok=True)
(out / "data_config.json").write_text(json.dumps(datasets, indent=1))
PYTHON

step "before: what codebook inference would make of the example data, at the anchors and at 256 x 256"
plan=(python vision_tokenizer/tokenizer/plan_codebook_inference.py --data_config "$DATA" --model_config $CONFIG)
"${plan[@]}" --resolution_type fixed_anchors --out_dir "$OUT/plan_anchors"
"${plan[@]}" --resolution_type fixed --resolution 256 --out_dir "$OUT/plan_256"

step "images to codes, two processes"
torchrun --nproc_per_node=2 vision_tokenizer/tokenizer/tokenizer_codebook_inference.py "${job[@]}" "${tokenizer[@]}"

step "after: is everything there, are the codes right, what do they look like"
python vision_tokenizer/tokenizer/verify_codebook.py "${job[@]}" "${tokenizer[@]}" --sample 8
python vision_tokenizer/tokenizer/preview_codes.py "${job[@]}" "${tokenizer[@]}" --out_dir "$OUT/preview"

step "conversations to token files, two processes of a shell loop"
for i in 0 1; do
  python -u pre_tokenize/pre_tokenize.py --splits=2 --rank=$i --target_size 512 --out_dir "$OUT/tokens" \
    --in_filename configs/data_configs/unitoken_examples/conversations.json --image_dir $EXAMPLES \
    --tokenizer_dir $CHAMELEON &> "$OUT/pre_tokenize-$i.log" &
done
wait
python -u pre_tokenize/concat_record.py --sub_record_dir "$OUT/tokens" --save_path "$OUT/tokens/record.json"

step "stage I and II of a toy model on those token files"
OUTPUT=$OUT/train RECORD=$OUT/tokens/record.json bash exps/smoke-train.sh

step "captions learned by heart by toy models of both kinds, and their pictures drawn again"
OUT=$OUT bash exps/learn-by-heart.sh

codes=$OUT/codes/examples_generation/jsonl_after_tokenizer/dualvitok/fixed_256/0000.jsonl
step "made from the shipped photographs"
printf '%-18s %s\n' codes $codes report "$OUT/preview/report.html" plan "$OUT/plan_anchors/plan.png" \
  tokens "$OUT/tokens/record.json" model "$OUT/train/stage2/final" losses "$OUT/train/stage2/loss.png" \
  drawn "$OUT/by-heart/unitoken/drawn/sheet.png" 'drawn, lm' "$OUT/by-heart/lm/drawn/sheet.png"
printf 'a line of codes:   '; head -c 420 $codes; echo ...
