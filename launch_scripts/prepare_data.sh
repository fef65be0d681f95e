#!/usr/bin/env bash
# Builds the training shards of paper_256, and held-out shards for evaluation, from MS-COCO 2017 and Visual Genome 1.4.
#
#   bash launch_scripts/prepare_data.sh [OUT] [key=value ...]        OUT is shards/paper_256 if absent; OUT_val is built too
#
# It downloads nothing: if files are missing, it lists them and where they are published, and stops. After an
# interruption the same command resumes where it stopped. These variables may be set:
#   COCO      folder with annotations/, train2017/ and val2017/; data/coco if unset
#   VG        folder with the JSON files, VG_100K/ and VG_100K_2/; data/visual_genome if unset
#   VQGAN     folder of the image tokenizer; tokenizers/vqgan_imagenet_f16_1024 if unset
#   RECIPE    data recipe, a path or a shipped name; coco_vg_256 if unset
#   WORKERS   processes that read images; one per core if unset
set -euo pipefail

coco="${COCO:-data/coco}"
vg="${VG:-data/visual_genome}"
vqgan="${VQGAN:-tokenizers/vqgan_imagenet_f16_1024}"
recipe="${RECIPE:-coco_vg_256}"
workers="${WORKERS:-$(nproc)}"

main() {
    local out="shards/paper_256"
    if [[ $# -gt 0 && "$1" != *=* ]]; then
        out="$1"
        shift
    fi
    local root
    root="$(cd "$(dirname "$0")/.." && pwd)"
    if [[ -x "$root/.venv/bin/icl-moe" ]]; then
        PATH="$root/.venv/bin:$PATH"
    fi
    check_files
    build train "$out" "$@"
    build val "${out}_val" "$@"     # With the classes of the training split: their descriptions are counted there.
}

# build SPLIT OUT [key=value ...]: SPLIT is train or val, of COCO and, since Visual Genome has no split, of DenseCap. About half of
# Visual Genome's images are also in COCO, so a held-out image of one task may be a training image of the other.
build() {
    local split="$1" out="$2"
    shift 2
    icl-moe shards build "$recipe" \
        tokenizer="$vqgan" \
        segmentation.annotations="$coco/annotations/instances_${split}2017.json" segmentation.images="$coco/${split}2017" \
        captioning.images="$vg" captioning.regions="$vg/region_descriptions.json" captioning.objects="$vg/objects.json" \
        captioning.image_data="$vg/image_data.json" captioning.splits="$vg/densecap_splits.json" captioning.split="$split" \
        captioning.counted_split=train \
        "$@" --out "$out" --workers "$workers"
    icl-moe shards verify "$out"
    icl-moe shards stats "$out"
}

check_files() {
    local missing=0
    need "$coco/annotations/instances_train2017.json" http://images.cocodataset.org/annotations/annotations_trainval2017.zip
    need "$coco/annotations/instances_val2017.json" http://images.cocodataset.org/annotations/annotations_trainval2017.zip
    need "$coco/train2017" http://images.cocodataset.org/zips/train2017.zip
    need "$coco/val2017" http://images.cocodataset.org/zips/val2017.zip
    local genome=https://homes.cs.washington.edu/~ranjay/visualgenome/data/dataset
    need "$vg/region_descriptions.json" "$genome/region_descriptions.json.zip"
    need "$vg/objects.json" "$genome/objects.json.zip"
    need "$vg/image_data.json" "$genome/image_data.json.zip"
    need "$vg/densecap_splits.json" https://raw.githubusercontent.com/jcjohnson/densecap/master/info/densecap_splits.json
    need "$vg/VG_100K" https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip
    need "$vg/VG_100K_2" https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip
    need "$vqgan" "https://heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/ (then icl-moe tokenizer convert)"
    if [[ $missing -gt 0 ]]; then
        echo "Nothing was built: $missing of 11 files or folders are missing. Fetch them, or set COCO, VG and VQGAN to their folders." >&2
        exit 2
    fi
}

# need PATH SOURCE: count and report a missing file
need() {
    if [[ ! -e "$1" ]]; then
        echo "missing: $1    published at $2" >&2
        missing=$((missing + 1))
    fi
}

main "$@"
