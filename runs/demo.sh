#!/usr/bin/env bash
# The whole pipeline on the built-in demo, on a laptop without a GPU: bash runs/demo.sh
# A second run takes up what is there; to start over, delete data/demo and out/demo.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt

begin=$SECONDS
stage() {
    local output=$1 title=$2
    shift 2
    if [ -n "$output" ] && [ -e "$output" ]; then
        echo "== $title：已有 $output"
    else
        echo
        echo "== $title：python $*"
        python "$@"
    fi
}

stage data/demo/clean               "1/9 清洗去重"   data_clean/clear.py --demo
stage data/demo/tokenizer.json      "2/9 训练词表"   train_tokenizer.py --demo
stage data/demo/valid_data.json     "3/9 分词"       data_process.py --demo
stage ""                            "4/9 预训练"     pretrain.py --demo --resume
stage data/demo/sft_data.csv        "5/9 指令数据"   sft_data_process.py --demo
stage ""                            "6/9 指令微调"   sft.py --demo --resume
stage ""                            "7/9 续写"       eval_pretrain.py --demo
stage ""                            "8/9 问答评测"   eval.py --demo
stage ""                            "9/9 导出核对"   export.py --demo --format hf --overwrite --check

minutes=$(((SECONDS - begin) / 60)) seconds=$(((SECONDS - begin) % 60))
echo
echo "全部完成，用时 $minutes 分 $seconds 秒。heldout 一行是训练中从未出现过的问法。"
echo "损失曲线：out/demo/pretrain/loss.png，out/demo/sft/loss.png"
echo "和它聊天：.venv/bin/python eval.py --demo --chat，或在网页里：.venv/bin/python serve.py --demo"
