# codebook inference for stage 1&2 data: using fixed 256 resolution
cd vision_tokenizer
export PYTHONPATH=$PYTHONPATH:$(pwd)

TOKENIZER_CONFIG=../configs/example/dualvitok/dualvitok_anyres_max512.py
TOKENIZER_CKPT=../checkpoints/dualvitok/pytorch_model.bin

resolution=256
resolution_type=fixed
DATA_CONFIG=../configs/data_configs/train_data_examples/examples_meta_data_config.json

torchrun --nproc_per_node=8 tokenizer/tokenizer_codebook_inference.py \
--model_config $TOKENIZER_CONFIG \
--tokenizer_checkpoint $TOKENIZER_CKPT \
--data_config $DATA_CONFIG \
--resolution_type $resolution_type \
--resolution $resolution \
--torch_dtype fp32
