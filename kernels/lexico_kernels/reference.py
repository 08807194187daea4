"""The torch twins: each public operation in the plainest vectorised code that is right, on any device.

They serve an engine without a GPU, so they loop over requests and OMP passes but never over vectors or tokens. All
arithmetic is float32, but for `omp` of float64 vectors, which benchmarks compare with.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import BF16_MAX, KV, LEVEL_BITS, MOST_LOST, CodeLayout
from lexico_kernels.memory.pages import LayerCache, LayerStack, RequestTables
from lexico_kernels.memory.records import load_records, store_records

CHUNK_FLOATS = 1 << 24  # correlations held at once by `omp`, as a bound on its memory
MIN_FRESH = 1e-2  # an atom this close to the span of those chosen (length of its remainder) is of no use
MIN_RESIDUAL = 1e-5  # a residual this small compared with its vector is rounding: nothing is left to code
# fp8 e4m3 keeps its precision from 2^-6 up: the largest coefficient is stored as 256 to leave small ones room.
FP8_PEAK = 256.0


def write_tail(key: Tensor, value: Tensor, cache: LayerCache, tail_slot_mapping: Tensor) -> None:
    """Store raw tokens in the tail pages.

    Args:
        key, value: [T, Hk, D], keys after RoPE.
        cache: the layer's pages.
        tail_slot_mapping: int64 [T], page * R + offset; negative slots and those of page 0 are skipped.
    """
    R = cache.layout.tail_tokens
    rows = (tail_slot_mapping >= R).nonzero().squeeze(1)
    slots = tail_slot_mapping[rows]
    for kv, tokens in enumerate((key, value)):
        cache.tail_pages[slots // R, :, slots % R, kv] = tokens[rows].to(cache.tail_pages.dtype)


def omp_encode(
    key: Tensor, value: Tensor, cache: LayerCache, source: Tensor, destination: Tensor, *, relative_error: float = 0.0
) -> None:
    """Code tokens of this batch or of the tail into the code pages (Lexico, section 3.2).

    Args:
        key, value: [T, Hk, D].
        cache: the layer's pages.
        source: int32 [M]; a row of key and value, or -1 - slot for the tail slot page * R + offset.
        destination: int64 [M], page * P + offset of the code; below P (page 0 or negative) the job is skipped.
        relative_error: OMP stops a vector when its residual's norm is at most this share of its own.
    """
    layout, P = cache.layout, cache.layout.block_tokens
    kept = (destination >= P).nonzero().squeeze(1)
    if not len(kept):
        return
    source, destination = source[kept].long(), destination[kept]
    raw = source < 0
    slots, R = -1 - source[raw], layout.tail_tokens
    for index, (kv, tokens) in enumerate(zip(KV, (key, value), strict=True)):
        vectors = cache.tail_pages.new_empty(len(source), layout.num_kv_heads, layout.head_dim)
        vectors[~raw] = tokens[source[~raw]].to(vectors.dtype)
        vectors[raw] = cache.tail_pages[slots // R, :, slots % R, index]
        records = encode_heads(vectors, cache.codebook(kv), layout, kv, relative_error)
        store_records(cache.code_pages, layout, kv, destination, records)


def omp_encode_layers(layers: LayerStack, source: Tensor, destination: Tensor, *, relative_error: float = 0.0) -> None:
    """Code the same tokens of all layers from their tails into their code pages.

    Args:
        layers: their pages.
        source: int32 [M]; -1 - slot for the tail slot page * R + offset.
        destination: int64 [M], page * P + offset of the code; from the first job below P on nothing is to be coded.
        relative_error: see `omp_encode`.
    """
    for cache in layers.caches:
        nothing = cache.tail_pages.new_empty(0, cache.layout.num_kv_heads, cache.layout.head_dim)
        omp_encode(nothing, nothing, cache, source, destination, relative_error=relative_error)


def sparse_decode(
    query: Tensor,
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_seq_len: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of single tokens over coded and raw history.

    Args:
        query: [T, Hq, D], Hq a multiple of Hk.
        cache: the layer's pages; the K and V of every position that is read are written already.
        tables: where the requests' tokens live.
        token_request: int32 [T], the token's row in the tables.
        token_seq_len: int32 [T]; the token sees positions [0, token_seq_len). 0: its row of out is 0, its lse -inf.
        scale: of the scores before softmax.
        out: [T, Hq, D] in the query's dtype, filled if given.
        soft_cap: scaled scores become soft_cap * tanh(score / soft_cap); 0 leaves them.
        sinks: [Hq], a score of each head that takes its share of the weight and has no value; not in lse.

    Returns:
        out, and lse float32 [T, Hq]: natural log of the sum of exponentials of the scores, scaled and capped.
    """
    T, Hq, D = query.shape
    Hk = cache.layout.num_kv_heads
    out = torch.empty_like(query) if out is None else out
    out.zero_()
    lse = torch.full((T, Hq), -torch.inf, device=query.device)
    seen = token_seq_len > 0
    for request in torch.unique(token_request[seen]).tolist():
        rows = (seen & (token_request == request)).nonzero().squeeze(1)
        lengths = token_seq_len[rows]
        stop = int(lengths.max())
        keys, values = history(cache, tables, request, torch.arange(stop, device=query.device))
        q = query[rows].float().view(len(rows), Hk, Hq // Hk, D)
        scores = torch.einsum("thgd,nhd->thgn", q, keys) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        hidden = torch.arange(stop, device=query.device) >= lengths[:, None]
        scores.masked_fill_(hidden[:, None, None], -torch.inf)
        attended = torch.einsum("thgn,nhd->thgd", scores.softmax(-1), values).reshape(len(rows), Hq, D)
        lse[rows] = scores.logsumexp(-1).view(len(rows), Hq)
        if sinks is not None:
            attended = attended * (lse[rows] - sinks).sigmoid()[..., None]
        out[rows] = attended.to(out.dtype)
    return out, lse


def reconstruct(
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_position: Tensor,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    """Write tokens of any requests as dense K and V, from codes or raw as the tables say.

    Args:
        cache: the layer's pages.
        tables: where the requests' tokens live.
        token_request: int32 [n], the token's row in the tables.
        token_position: int32 [n], the token's position in its sequence.
        out_key, out_value: [n, Hk, D], any float dtype.
    """
    for request in torch.unique(token_request).tolist():
        rows = (token_request == request).nonzero().squeeze(1)
        keys, values = history(cache, tables, request, token_position[rows].long())
        out_key[rows], out_value[rows] = keys.to(out_key.dtype), values.to(out_value.dtype)


def history(cache: LayerCache, tables: RequestTables, request: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """K and V at positions int64 [n] of a request: two float32 [n, Hk, D]."""
    layout, P, R = cache.layout, cache.layout.block_tokens, cache.layout.tail_tokens
    raw = (positions < tables.sink_end[request]) | (positions >= tables.raw_start[request])
    coded, raw = (~raw).nonzero().squeeze(1), raw.nonzero().squeeze(1)
    at = positions[coded]
    slots, tail = tables.block_table[request][at // P].long() * P + at % P, positions[raw]
    raw_tokens = cache.tail_pages[tables.tail_block_table[request][tail // R].long(), :, tail % R].float()
    dense = []
    for index, kv in enumerate(KV):
        records = load_records(cache.code_pages, layout, kv, slots)
        tokens = raw_tokens.new_empty(len(positions), layout.num_kv_heads, layout.head_dim)
        tokens[coded] = decode_heads(records, cache.codebook(kv), layout, kv, cache.tail_pages.dtype)
        tokens[raw] = raw_tokens[:, :, index]
        dense.append(tokens)
    return dense[0], dense[1]


def encode_heads(vectors: Tensor, book: Codebook, layout: CodeLayout, kv: str, relative_error: float = 0.0) -> Tensor:
    """Vectors [M, Hk, D] of all heads -> records uint8 [M, Hk, vector_bytes], centred and stretched first."""
    if layout.codec == "exact":
        return vectors.contiguous().view(torch.uint8)
    centred, S = (vectors.float() - book.mean) / book.stretch, layout.sparsity(kv)
    heads = [
        encode_vectors(centred[:, head], book.head(head), S, layout.codec, relative_error)
        for head in range(vectors.shape[1])
    ]
    return torch.stack(heads, 1)


def decode_heads(records: Tensor, book: Codebook, layout: CodeLayout, kv: str, dtype: torch.dtype) -> Tensor:
    """Inverse of `encode_heads`: records uint8 [M, Hk, vector_bytes] -> float32 [M, Hk, D]. dtype: of exact vectors."""
    if layout.codec == "exact":
        return _as(records, dtype).float()
    heads = [
        decode_vectors(records[:, head], book.head(head), layout.sparsity(kv), layout.codec)
        for head in range(records.shape[1])
    ]
    return torch.stack(heads, 1) * book.stretch + book.mean


def encode_vectors(
    vectors: Tensor, book: Codebook, sparsity: int, codec: str = "packed16", relative_error: float = 0.0
) -> Tensor:
    """Centred vectors [M, D] of one head -> records uint8 [M, bytes]; NaN or infinity gives an all-zero record."""
    indices, coefficients = omp(vectors, book.atoms[0], sparsity, relative_error)
    scale = _scale(coefficients)
    stored = scale.float() * gain_factor(vectors, indices, coefficients, book)
    if codec == "paper":
        ratio = coefficients * (FP8_PEAK / scale.float())
        small = torch.where(indices > 0, ratio, 0.0).to(torch.float8_e4m3fn)
        fields = [_bf16(stored / FP8_PEAK), indices.to(torch.int16), small]
    else:
        indices, levels = quantize(indices, coefficients, scale, book.levels)
        entries = (indices << LEVEL_BITS) | levels
        entries = torch.where(entries < 1 << 15, entries, entries - (1 << 16))  # the bits of a uint16 as int16
        fields = [_bf16(stored), entries.to(torch.int16)]
    records = torch.cat([field.contiguous().view(torch.uint8) for field in fields], 1)
    return records * (indices > 0).any(1, keepdim=True)


def gain_factor(vectors: Tensor, indices: Tensor, coefficients: Tensor, book: Codebook) -> Tensor:
    """float32 [M, 1]: what the scales of codes [M, S] of vectors [M, D] are multiplied by, see `Codebook.gain`."""
    unit, norm = _unit(vectors.float())
    weights = torch.where(norm > 0, coefficients / norm, 0.0)
    rest = unit - embedding_bag(indices, book.atoms[0].float(), per_sample_weights=weights, mode="sum")
    lost = rest.square().sum(1, keepdim=True).clamp(max=MOST_LOST)
    return (1 - lost) ** -book.gain


def _bf16(scale: Tensor) -> Tensor:
    return scale.clamp(max=BF16_MAX).to(torch.bfloat16)


def decode_vectors(records: Tensor, book: Codebook, sparsity: int, codec: str = "packed16") -> Tensor:
    """Records uint8 [M, bytes of a vector] of one head -> centred vectors float32 [M, D]."""
    scale = _as(records[:, :2], torch.bfloat16).float()
    codes = _as(records[:, 2 : 2 + 2 * sparsity], torch.int16).long()
    if codec == "paper":
        indices = codes
        coefficients = _as(records[:, 2 + 2 * sparsity :], torch.float8_e4m3fn).float()
    else:
        codes = codes & 0xFFFF
        indices, coefficients = codes >> LEVEL_BITS, book.levels[codes & ((1 << LEVEL_BITS) - 1)]
    indices = indices.clamp(0, book.num_atoms - 1)  # whatever the bytes are, stay within the dictionary
    return embedding_bag(indices, book.atoms[0].float(), per_sample_weights=coefficients * scale, mode="sum")


def _as(records: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers. A clone, since `contiguous` leaves the odd strides of a single row, which `view` refuses."""
    return records.clone(memory_format=torch.contiguous_format).view(dtype)


def _scale(coefficients: Tensor) -> Tensor:
    """bf16 [M, 1]: the largest magnitude of each row of coefficients [M, S]; 1 where nothing is coded."""
    scale = coefficients.abs().amax(1, keepdim=True).to(torch.bfloat16)
    return torch.where(scale > 0, scale, 1.0)


def quantize(indices: Tensor, coefficients: Tensor, scale: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest level of every coefficient; zero is a level too, for free: the null atom's entry.

    Args:
        indices: int64 [M, S].
        coefficients: float32 [M, S].
        scale: bf16 [M, 1], as it will be stored: levels are picked against the rounded scale.
        levels: float32 [16], ascending.

    Returns:
        indices with those set to 0 that zero describes better, and int64 levels [M, S], 0 at index 0.
    """
    ratio = coefficients / scale.float()
    nearest = torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)
    kept = (indices > 0) & ((ratio - levels[nearest]).abs() < ratio.abs())
    return torch.where(kept, indices, 0), torch.where(kept, nearest, 0)


def quantized(indices: Tensor, coefficients: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M, S] as "packed16" keeps them: indices, 0 where zero describes better, and coefficients float32."""
    scale = _scale(coefficients)
    indices, level = quantize(indices, coefficients, scale, levels)
    return indices, torch.where(indices > 0, levels[level] * scale.float(), 0.0)


def pursue(
    vectors: Tensor, atoms: Tensor, sparsity: int, levels: Tensor | None = None, *, relative_error: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of many vectors over several dictionaries at once, for training and study.

    Args:
        vectors: [G, M, D], centred.
        atoms: [G, N, D], N <= 4096; row 0 of each is the null atom.
        sparsity: S, passes.
        levels: float32 [G, 16] to quantize as "packed16" does, or None for coefficients as they are.
        relative_error: as in `omp`.

    Returns:
        indices int32 [G, M, S], 0 where nothing was chosen; coefficients float32 [G, M, S], 0 there; and the residual
        float32 [G, M, D], vector minus code, or 0 for vectors of no finite norm.
    """
    pieces = []
    for group, (own, book) in enumerate(zip(vectors, atoms, strict=True)):
        indices, coefficients = omp(own, book, sparsity, relative_error)
        if levels is not None:
            indices, coefficients = quantized(indices, coefficients, levels[group])
        code = embedding_bag(indices, book.float(), per_sample_weights=coefficients, mode="sum")
        residual = torch.where(_unit(own.float())[1] > 0, own.float() - code, 0.0)
        pieces.append((indices.int(), coefficients, residual))
    return tuple(torch.stack(tensors) for tensors in zip(*pieces, strict=True))  # type: ignore[return-value]


def omp(vectors: Tensor, atoms: Tensor, sparsity: int, relative_error: float = 0.0) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit of every vector (Lexico, section 3.2 and algorithm 1).

    Each pass takes the atom of the largest |correlation| with the residual and solves least squares on all chosen
    atoms, here by a QR factorisation that grows by a column. A vector stops at the relative error, when only rounding
    is left, or when no atom outside the span of its chosen ones helps.

    Args:
        vectors: [M, D]; rows with NaN or infinity get no atoms. float64 is computed in float64, all else in float32.
        atoms: [N, D]; row 0 is the null atom and never chosen.
        sparsity: S, passes.
        relative_error: stop at norm(residual) <= relative_error * norm(vector).

    Returns:
        indices int64 [M, S], 0 where nothing was chosen, and coefficients [M, S] as computed, 0 there.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    atoms = atoms.to(dtype)
    rows = max(1, CHUNK_FLOATS // atoms.shape[0])
    pieces = [_omp(chunk.to(dtype), atoms, sparsity, relative_error) for chunk in vectors.split(rows)]
    return torch.cat([indices for indices, _ in pieces]), torch.cat([coefficients for _, coefficients in pieces])


def _omp(vectors: Tensor, atoms: Tensor, sparsity: int, relative_error: float) -> tuple[Tensor, Tensor]:
    (M, D), S = vectors.shape, sparsity
    unit, norm = _unit(vectors)
    residual = unit.clone()
    active = norm.squeeze(1) > 0
    indices = torch.zeros(M, S, dtype=torch.int64, device=vectors.device)
    basis = unit.new_zeros(M, S, D)  # orthonormal, spans the chosen atoms
    projections = unit.new_zeros(M, S)
    for step in range(S):
        correlation = (residual @ atoms.T).abs_()
        correlation[:, 0] = 0  # even if the caller's null atom is not zero
        correlation.scatter_(1, indices[:, :step], 0.0)
        best = correlation.argmax(1)
        fresh = atoms[best]
        for _ in range(2):  # once is not orthogonal enough in float32, twice is
            along = torch.bmm(basis[:, :step], fresh[:, :, None])
            fresh = fresh - torch.bmm(along.transpose(1, 2), basis[:, :step]).squeeze(1)
        length = fresh.norm(dim=1)
        active = active & (length > MIN_FRESH) & (correlation.gather(1, best[:, None]).squeeze(1) > 0)
        fresh = fresh * torch.where(active, 1 / length, 0.0)[:, None]
        basis[:, step] = fresh
        projections[:, step] = (fresh * residual).sum(1)
        residual = residual - projections[:, step, None] * fresh
        indices[:, step] = torch.where(active, best, 0)
        active = active & (residual.norm(dim=1) > max(relative_error, MIN_RESIDUAL))
        if not active.any():
            break
    chosen = indices > 0
    triangle = torch.bmm(basis, atoms[indices].transpose(1, 2)).triu()
    triangle.diagonal(dim1=1, dim2=2).masked_fill_(~chosen, 1.0)
    solution = torch.linalg.solve_triangular(triangle, projections[:, :, None], upper=True).squeeze(2)
    coefficients = torch.where(chosen, solution * norm, 0.0)
    # A vector near the largest float32 may have coefficients beyond it; like infinity it gets no code.
    finite = coefficients.to(torch.bfloat16).isfinite().all(1, keepdim=True)
    return torch.where(finite, indices, 0), torch.where(finite, coefficients, 0.0)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length 1, and their norms [M, 1]; zero rows and those of no finite norm become 0 of norm 0."""
    peak = vectors.abs().amax(1, keepdim=True)
    usable = (peak > 0) & peak.isfinite()
    scaled = torch.where(usable, vectors / peak, 0.0)  # by the peak first: squares must not overflow
    length = scaled.norm(dim=1, keepdim=True)
    usable = usable & (peak * length).isfinite()
    return torch.where(usable, scaled / length, 0.0), torch.where(usable, peak * length, 0.0)
