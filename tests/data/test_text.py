import json

import numpy as np
import pytest

from iterbatch.data.blocks import Blocks, prepare_blocks
from iterbatch.data.corpus import read_corpus
from iterbatch.data.data_loader import BatchStream, block_order, order_digest
from iterbatch.data.documents import Document, Documents
from iterbatch.data.wikitext import detokenize_wikitext, wikitext_articles
from iterbatch.data.windows import prepare_eval
from iterbatch.errors import DataError

# -- forms of text ----------------------------------------------------------------------------------- -----


@pytest.mark.parametrize(
    ("spaced", "plain"),
    [
        ("A cat , a dog ; and ( maybe ) a bird .", "A cat, a dog; and (maybe) a bird."),
        ("17 @-@ match run of 1 @,@ 000 and 2 @.@ 5", "17-match run of 1,000 and 2.5"),
        ('He said " go on " and left .', 'He said "go on" and left.'),
        ("the club 's players did n't", "the club's players didn't"),
        (" = = Early life = = ", "== Early life =="),
        (" = Homarus gammarus = ", "= Homarus gammarus ="),
        ("£ 5 or $ 3", "£5 or $3"),
    ],
)
def test_detokenize(spaced, plain):
    assert detokenize_wikitext(spaced) == plain


def test_articles_begin_at_top_level_headings():
    lines = [
        " \n",
        " = One = \n",
        " \n",
        " text \n",
        " = = Section = = \n",
        " more \n",
        " \n",
        " = Two = \n",
        " \n",
        " x = y = z \n",
    ]
    articles = list(wikitext_articles(lines))
    assert len(articles) == 2
    assert "Section" in articles[0]
    assert articles[1].strip().startswith("= Two =")


def test_every_wikitext_article_is_found(real_text):
    splits = read_corpus("wikitext", data_dir=real_text / "wikitext-2").splits
    assert (len(splits["validation"]), len(splits["test"])) == (60, 60)  # as published
    assert sum(document.words for document in splits["test"]) == pytest.approx(
        245_569 - 4_358, rel=0.01
    )  # less one end-of-line token a line


# -- files ------------------------------------------------------------------------------------------- -----


def _write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def _jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [{"text": f"Document {number}."} for number in range(20)]


def test_text_and_wikitext_read(tmp_path):
    _write(tmp_path / "a", "book.txt", "\n\n".join(row["text"] for row in ROWS))
    articles = "".join(f" \n = Title {n} = \n \n Words , here . \n" for n in range(20))
    _write(tmp_path / "b", "wiki.train.tokens", articles)
    for folder in ("a", "b"):
        corpus = read_corpus("mine", data_dir=tmp_path / folder)
        assert {split: each.documents for split, each in corpus.splits.items()} == {
            "train": 16,
            "validation": 2,
            "test": 2,
        }
        assert any("held out" in note for note in corpus.notes)
        assert corpus.digest() == read_corpus("mine", data_dir=tmp_path / folder).digest()


def test_splits_by_name_in_files_and_folders(tmp_path):
    for name, number in (("train/a.jsonl", 3), ("my-valid.jsonl", 2), ("test.jsonl", 1)):
        _write(tmp_path, name, _jsonl(ROWS[:number]))
    corpus = read_corpus("mine", data_dir=tmp_path)
    assert [len(corpus.splits[split]) for split in ("train", "validation", "test")] == [3, 2, 1]
    assert corpus.notes == []


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    _write(tmp_path, "a.txt", b"\xef\xbb\xbf" + b"\r\n\r\n".join(b"Part %d" % n for n in range(12)))
    assert not any(
        document.text.startswith("\ufeff") or "\r" in document.text
        for document in read_corpus("x", data_dir=tmp_path).splits["train"]
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8: byte 0xe9 near byte 3"),
        ("a.jsonl", '{"text": "fine"}\n{"text": broken}\n', "line 2: not valid JSON"),
        ("a.jsonl", '{"text": "fine"}\n[1, 2]\n', "line 2: a list where an object"),
        ("a.jsonl", '{"body": "x"}\n', r"have the fields \['body'\]; one of them must be 'text'"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.docx", b"x", "holds no file with one of the endings"),
        ("only-test.jsonl", '{"text": "x"}\n', "no training text"),
        ("a.txt", "one paragraph only", "too few to hold out"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    _write(tmp_path, name, content)
    with pytest.raises(DataError, match=message):
        read_corpus("mine", data_dir=tmp_path)


def test_missing_folder_and_unknown_name(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_corpus("mine", data_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"unknown dataset 'wikitxt'.*did you mean 'wikitext'"):
        read_corpus("wikitxt")


# -- blocks and batches ------------------------------------------------------------------------------ -----


DOCUMENTS = [
    Document.of(f"Document number {number} has its own words. " * (1 + number % 5)) for number in range(30)
]


def test_blocks_are_the_documents_from_bos_to_eos(tokenizer):
    blocks = prepare_blocks(DOCUMENTS, tokenizer, 16, data_key="blocks-test").ids
    expected = [
        token
        for document in DOCUMENTS
        for token in [
            tokenizer.bos_token_id,
            *tokenizer(document.text, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
    ]
    assert blocks.shape == (len(expected) // 16, 16)
    assert blocks.flatten().tolist() == expected[: blocks.size]
    assert isinstance(blocks, np.memmap)
    assert (
        prepare_blocks([], tokenizer, 16, data_key="blocks-test").ids.tolist() == blocks.tolist()
    )  # found again, not made again
    assert (
        prepare_blocks(DOCUMENTS, tokenizer, 16, 100, data_key="blocks-test").ids.tolist()
        == blocks[:6].tolist()
    )


def test_blocks_kept_are_believed_only_as_they_were_written(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ITERBATCH_CACHE", str(tmp_path))
    documents = [Document.of(f"Document {n} has words of its own, {n * n} of them.") for n in range(40)]

    def prepared():
        return prepare_blocks(documents, tokenizer, 16, data_key="of this test")

    first = prepared()
    ids, trained = first.ids.copy(), first.trained.copy()
    (file,) = [each for each in (tmp_path / "blocks").glob("*.npy") if "trained" not in each.name]
    whole = file.read_bytes()
    fewer = whole.replace(f"({len(first)}, 16)".encode(), f"({len(first) - 1}, 16)".encode())
    for damaged in (whole[:-8] + bytes(8), fewer[:-32], whole[: len(whole) // 2], b""):
        assert damaged != whole
        file.write_bytes(damaged)
        again = prepared()
        assert np.array_equal(again.ids, ids)
        assert np.array_equal(again.trained, trained)
        assert "was changed or cut short on disk; the blocks are prepared anew" in again.note
        assert not prepared().note


def test_text_shorter_than_a_block(tokenizer):
    with pytest.raises(DataError, match="fewer than one block of 4096"):
        prepare_blocks(DOCUMENTS, tokenizer, 4096, data_key="short")


def test_order_depends_on_seed_and_epoch_alone():
    assert block_order(50, 1, 0).tolist() == block_order(50, 1, 0).tolist()
    orders = {tuple(block_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert order_digest(50, 1, 2) == order_digest(50, 1, 2) != order_digest(50, 2, 2)


def test_every_block_once_an_epoch_and_the_cursor_goes_on():
    blocks = Blocks.of(np.arange(11 * 4).reshape(11, 4))
    stream = BatchStream(blocks, batch_size=2, grad_accum=2, seed=3)
    batches = [next(stream) for _ in range(2 * stream.batches_per_epoch)]
    for epoch in (0, 1):
        seen = [
            row[0] // 4
            for batch in batches
            if batch.epoch == epoch
            for micro in batch.micro_batches
            for row in micro.input_ids.tolist()
        ]
        assert sorted(seen) == list(range(11))
    assert [len(batch.micro_batches) for batch in batches[:3]] == [2, 2, 2]
    assert batches[2].label_tokens == 3 * 3  # the short last window
    assert [batch.first_exposure for batch in batches] == [True] * 3 + [False] * 3

    other = BatchStream(blocks, batch_size=2, grad_accum=2, seed=3)
    other.load_state_dict({"cursor": 4})
    assert next(other).micro_batches[0].input_ids.tolist() == batches[4].micro_batches[0].input_ids.tolist()


def test_processes_share_a_batch_without_loss():
    blocks = Blocks.of(np.arange(7 * 4).reshape(7, 4))
    whole = BatchStream(blocks, batch_size=4, grad_accum=1, seed=3)
    halves = [BatchStream(blocks, batch_size=2, grad_accum=1, seed=3, rank=rank, world=2) for rank in (0, 1)]
    for _ in range(whole.batches_per_epoch):
        batch, parts = next(whole), [next(half) for half in halves]
        assert batch.label_tokens == sum(part.label_tokens for part in parts)
        assert len(parts[0].micro_batches) == len(parts[1].micro_batches)


def test_batches_have_labels_where_the_loss_is():
    ids = np.arange(1, 9).reshape(2, 4)
    blocks = Blocks(ids, np.array([[True, False, True, False], [False, False, False, True]]))
    batch = next(BatchStream(blocks, batch_size=2, grad_accum=1, seed=0))
    labels = {row[0]: each for row, each in zip(batch.micro_batches[0].input_ids.tolist(), batch.micro_batches[0].labels.tolist(), strict=True)}  # fmt: skip # noqa: E501
    assert labels == {1: [-100, 3, -100, -100], 5: [-100, -100, 8, -100]}
    assert batch.label_tokens == blocks.label_tokens().sum() == 2


def test_blocks_without_a_label_are_left_out(tokenizer):
    silent = Document.of("No loss here at all. " * 20, trained=())
    documents = [silent, *DOCUMENTS[:3], silent]
    blocks = prepare_blocks(documents, tokenizer, 8)
    assert blocks.label_tokens().min() >= 1
    labels = sum(
        len(tokenizer(each.text, add_special_tokens=False)["input_ids"]) + 1 for each in DOCUMENTS[:3]
    )
    assert blocks.trained.sum() == labels
    with pytest.raises(DataError, match="the loss is on no token"):
        prepare_blocks([silent], tokenizer, 8)


def test_eval_text_is_whole_documents_up_to_the_cap(tokenizer):
    text = prepare_eval(DOCUMENTS, tokenizer, 16, max_tokens=50)
    assert text.tokens >= 50
    assert sum(window.scored for window in text.windows) == text.tokens
    with pytest.raises(DataError, match="no tokens"):
        prepare_eval([], tokenizer, 16)


def test_a_long_document_is_cut_at_the_cap(tokenizer):
    long = Document.of("A word and another one. " * 500)
    text = prepare_eval([DOCUMENTS[0], long, DOCUMENTS[1]], tokenizer, 16, max_tokens=200)
    assert text.cut
    assert text.documents == 2
    assert text.all_tokens == 200
    assert text.tokens == 201  # and the end of the first
    assert text.words == pytest.approx(DOCUMENTS[0].words + (200 - text.document_tokens[0]) / 6 * 5, rel=0.1)
    assert not prepare_eval([DOCUMENTS[0]], tokenizer, 16, max_tokens=200).cut


def test_how_many_documents_of_one_length_say_as_much(tokenizer):
    assert prepare_eval(DOCUMENTS[:1] * 7, tokenizer, 16).counts.effective_documents == pytest.approx(7)
    uneven = prepare_eval([*DOCUMENTS[:6], Document.of("A word and another one. " * 500)], tokenizer, 16)
    assert 1 < uneven.counts.effective_documents < 1.2


def test_a_long_document_lies_in_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr("iterbatch.data.documents.PIECE", 1000)
    rows = [{"text": f"Document {number}. " * (200 if number == 7 else 1)} for number in range(20)]
    _write(tmp_path, "rows.jsonl", _jsonl(rows))
    splits = read_corpus("x", data_dir=tmp_path).splits
    assert {split: each.documents for split, each in splits.items()} == {
        "train": 16,
        "validation": 2,
        "test": 2,
    }
    with_it = [split for split, each in splits.items() if any("Document 7." in piece.text for piece in each)]
    assert len(with_it) == 1
    assert sum(len(each) for each in splits.values()) > 20


def test_a_long_text_is_handled_in_pieces_and_loses_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("iterbatch.data.documents.PIECE", 1000)
    lines = (
        "".join(f"Line {number} of a text that is longer than a piece.\n" for number in range(200))
        + "x" * 2500
        + " the end"
    )
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(lines, encoding="utf-8")
    documents = read_corpus("x", data_dir=tmp_path).splits["train"]
    assert "".join(document.text for document in documents) == lines
    assert max(len(document.text) for document in documents) <= 1000
    assert [document.ends for document in documents] == [False] * (len(documents) - 1) + [True]
    assert sum(document.bytes for document in documents) == len(lines)
    blocks = prepare_blocks(documents, tokenizer, 8)
    assert (
        blocks.ids == tokenizer.eos_token_id
    ).sum() <= 1  # pieces that go on with each other have none between them


def test_documents_on_disk_are_what_they_were():
    texts = ["plain", "", "café 中文", "\ud800 lone", "a\r\nb\x00"]
    documents = Documents(Document.of(text, ends=bool(place % 2)) for place, text in enumerate(texts))
    assert [document.text for document in documents] == texts
    assert [document.ends for document in documents] == [False, True, False, True, False]
    view = documents[np.array([3, 0])]
    assert [document.text for document in view] == [texts[3], texts[0]]
    assert len(view[1:]) == 1
