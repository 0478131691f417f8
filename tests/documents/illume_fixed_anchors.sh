# codebook inference for stage 2.5 & 3 data: using predefined resolution aspect ratio with pixel numbers close to 512*512
cd vision_tokenizer
TOKENIZER_CONFIG=../configs/example/dualvitok/dualvitok_anyres_max512.py
TOKENIZER_CKPT=../checkpoints/dualvitok/pytorch_model.bin

resolution=512
resolution_type=fixed_anchors
DATA_CONFIG=../configs/data_configs/train_data_examples/examples_meta_data_config.json

torchrun --nproc_per_node=8 tokenizer/tokenizer_codebook_inference.py \
--model_config $TOKENIZER_CONFIG \
--tokenizer_checkpoint $TOKENIZER_CKPT \
--data_config $DATA_CONFIG \
--resolution_type $resolution_type \
--resolution $resolution \
--torch_dtype fp32
