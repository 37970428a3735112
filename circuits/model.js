"use strict";
// ------------------------------------------------------------------------------------------------
// The model. As in model.py, in its order and with its names. A text is a list of rows, one for each
// token, each a Float32Array: what PyTorch has in float32 is float32 here, sums run in float64. Where two
// entries are as good as equal, AbsTopK may keep another than PyTorch does, whose sums are float32: its own
// logits in float32 and float64 then differ as much.

function kthLargest(values, k) {  // of a copy that may be reordered; Hoare's selection, no full sort
  let low = 0, high = values.length - 1;
  while (low < high) {
    const pivot = values[k - 1];
    let i = low, j = high;
    do {
      while (values[i] > pivot) i++;
      while (values[j] < pivot) j--;
      if (i <= j) { const swap = values[i]; values[i++] = values[j]; values[j--] = swap; }
    } while (i <= j);
    if (j < k - 1) low = i;
    if (k - 1 < i) high = j;
  }
  return values[k - 1];
}

function absTopK(x, k) {  // the k entries of largest magnitude, among equals the lower index first
  const least = kthLargest(x.map(Math.abs), k);
  let equal = k;
  for (let i = 0; i < x.length; i++) if (Math.abs(x[i]) > least) equal--;
  return x.map(v => Math.abs(v) > least || (Math.abs(v) === least && equal-- > 0) ? v : 0);
}

function attentionWeights(q, k, head, dHead, sinkLogit) {  // of one query (width) to the keys of its past
  const scores = new Float64Array(k.length), from = head * dHead;
  let most = sinkLogit;
  for (let s = 0; s < k.length; s++) {
    let sum = 0;
    for (let c = from; c < from + dHead; c++) sum += q[c] * k[s][c];
    scores[s] = sum / Math.sqrt(dHead);
    most = Math.max(most, scores[s]);
  }
  let total = Math.exp(sinkLogit - most);
  for (let s = 0; s < k.length; s++) total += scores[s] = Math.exp(scores[s] - most);
  return Float32Array.from(scores, score => score / total);
}

function erf(x) {  // to more than float32: a series, and a continued fraction for the tail
  const z = Math.abs(x), square = z * z;
  if (z > 6) return Math.sign(x);
  if (z < 2.5) {
    let term = 2 / Math.sqrt(Math.PI) * x * Math.exp(-square), sum = term;
    for (let n = 1; Math.abs(term) > 1e-17; n++) sum += term *= 2 * square / (2 * n + 1);
    return sum;
  }
  let tail = 0;
  for (let n = 40; n > 0; n--) tail = n / 2 / (z + tail);
  return Math.sign(x) * (1 - Math.exp(-square) / Math.sqrt(Math.PI) / (z + tail));
}

const ACTIVATIONS = {
  gelu: x => x.map(v => v * 0.5 * (1 + erf(v * Math.SQRT1_2))), relu: x => x.map(v => Math.max(v, 0)),
  identity: x => x,
};

class Norm {  // RMSNorm, or LayerNorm
  constructor(parameters, name, useRmsNorm) {
    this.weight = parameters[name + ".weight"].dense;
    this.bias = useRmsNorm ? null : parameters[name + ".bias"].dense;
    this.eps = useRmsNorm ? 1.1920929e-7 : 1e-5;
  }
  row(x) {
    let mean = 0, square = 0;
    if (this.bias) for (const v of x) mean += v / x.length;
    for (const v of x) square += (v - mean) ** 2 / x.length;
    const scale = 1 / Math.sqrt(square + this.eps);
    return x.map((v, i) => (v - mean) * scale * this.weight[i] + (this.bias ? this.bias[i] : 0));
  }
}

class Linear {  // the nonzero weights, by what they read: after AbsTopK most of that is zero
  constructor(parameters, name) {
    const {shape: [outputs, inputs], dense} = parameters[name + ".weight"];
    Object.assign(this, {outputs, inputs, weight: dense, reads: new Int32Array(inputs + 1)});
    this.bias = parameters[name + ".bias"]?.dense;
    const written = [], weights = [];
    for (let i = 0; i < inputs; i++) {
      for (let o = 0; o < outputs; o++) {
        const w = dense[o * inputs + i];
        if (w !== 0) { written.push(o); weights.push(w); }
      }
      this.reads[i + 1] = written.length;
    }
    this.written = Int32Array.from(written);
    this.weights = Float32Array.from(weights);
  }
  row(x, removed = []) {  // removed: edges, as {input, output, instead}, what is read there instead of x
    const y = new Float64Array(this.outputs);
    if (this.bias) y.set(this.bias);
    for (let i = 0; i < x.length; i++) {
      const v = x[i];
      if (v === 0) continue;
      for (let e = this.reads[i]; e < this.reads[i + 1]; e++) y[this.written[e]] += v * this.weights[e];
    }
    for (const {input, output, instead} of removed)
      y[output] += this.weight[output * this.inputs + input] * (instead - x[input]);
    return new Float32Array(y);
  }
}

const add = (x, y) => x.map((row, t) => row.map((v, i) => v + y[t][i]));

class Model {
  constructor(config, parameters, bigramRow) {
    Object.assign(this, {config, parameters, bigramRow});
    const width = config.n_head * config.d_head, d = config.d_model;
    const widths = {attn_in: d, attn_q: width, attn_k: width, attn_v: width, attn_out: d, mlp_in: d,
      mlp_neuron: config.d_mlp, mlp_out: d, resid_post_attn: d, resid_post_mlp: d};
    const on = config.activation_sparsity_locations.split(",").map(name => name.trim());
    this.k = {};  // how many AbsTopK keeps, where it is on
    for (const [location, n] of Object.entries(widths)) {
      const k = Math.trunc(config.activation_topk_fraction * n);
      if (on.includes(location) && k < n) this.k[location] = k;
    }
    const norm = name => new Norm(parameters, name, config.use_rms_norm);
    const linear = name => new Linear(parameters, name);
    this.wte = parameters["transformer.wte.weight"].dense;
    this.wpe = parameters["transformer.wpe.weight"]?.dense;
    this.blocks = Array.from({length: config.n_layer}, (_, i) => {
      const h = `transformer.h.${i}.`;
      return {ln_1: norm(h + "ln_1"), c_attn: linear(h + "attn.c_attn"),
        attn_proj: linear(h + "attn.c_proj"),
        sink_logit: parameters[h + "attn.sink_logit"]?.dense, ln_2: norm(h + "ln_2"),
        c_fc: linear(h + "mlp.c_fc"), mlp_proj: linear(h + "mlp.c_proj")};
    });
    this.ln_f = norm("transformer.ln_f");
    this.lm_head = linear(config.tie_embeddings ? "transformer.wte" : "lm_head");
  }

  site(name, rows, change) {  // AbsTopK, then the gates: 1 keeps a node, 0 freezes it, -1 reverses it
    const k = this.k[name.split(".").at(-1)], gates = change.gates?.[name], mean = change.ablated?.[name];
    rows = k ? rows.map(row => absTopK(row, k)) : rows;
    if (gates) rows = rows.map(row => row.map((v, c) => gates[c] * v + (1 - gates[c]) * mean[c]));
    change.watch?.(name, rows);
    return rows;
  }

  attention(i, x, last, change) {
    const {n_head, d_head} = this.config, width = n_head * d_head, block = this.blocks[i];
    const h = this.site(`${i}.attn.attn_in`, x, change);
    const qkv = h.map(row => block.c_attn.row(row, change.removed?.[`${i}.c_attn`]));
    const [q, k, v] = ["q", "k", "v"].map((name, part) => this.site(
      `${i}.attn.attn_${name}`, qkv.map(row => row.slice(part * width, (part + 1) * width)), change));
    const y = [], shares = [];
    for (let t = last ? x.length - 1 : 0; t < x.length; t++) {
      const past = k.slice(0, t + 1), out = new Float64Array(width);
      shares.push([]);
      for (let head = 0; head < n_head; head++) {
        const weights = attentionWeights(q[t], past, head, d_head, block.sink_logit?.[head] ?? -Infinity);
        shares.at(-1).push(weights);
        for (let s = 0; s <= t; s++) {
          if (weights[s] !== 0)
            for (let c = head * d_head; c < (head + 1) * d_head; c++) out[c] += weights[s] * v[s][c];
        }
      }
      y.push(new Float32Array(out));
    }
    change.watch?.(`${i}.attention`, shares);
    const out = y.map(row => block.attn_proj.row(row, change.removed?.[`${i}.attn_proj`]));
    return this.site(`${i}.attn.attn_out`, out, change);
  }

  mlp(i, x, change) {
    const block = this.blocks[i], act = ACTIVATIONS[this.config.activation];
    const h = this.site(`${i}.mlp.mlp_in`, x, change);
    const fc = h.map(row => act(block.c_fc.row(row, change.removed?.[`${i}.c_fc`])));
    const neurons = this.site(`${i}.mlp.mlp_neuron`, fc, change);
    const out = neurons.map(row => block.mlp_proj.row(row, change.removed?.[`${i}.mlp_proj`]));
    return this.site(`${i}.mlp.mlp_out`, out, change);
  }

  // The logits (vocab_size) after the last token of ids. change: what is ablated (site), the edges removed,
  // by matrix, and watch(name, rows). Without watch the last block runs for the last token alone.
  forward(ids, change = {}) {
    const act = ACTIVATIONS[this.config.residual_activation], d = this.config.d_model;
    let x = ids.map((id, t) => {
      const row = this.wte.slice(id * d, (id + 1) * d);
      return this.wpe ? row.map((v, c) => v + this.wpe[t * d + c]) : row;
    });
    this.blocks.forEach((block, i) => {
      const last = i === this.blocks.length - 1 && !change.watch;
      const y = this.attention(i, x.map(row => block.ln_1.row(row)), last, change);
      x = this.site(`${i}.resid_post_attn`, add(last ? x.slice(-1) : x, y).map(act), change);
      x = this.site(`${i}.resid_post_mlp`, add(x, this.mlp(i, x.map(row => block.ln_2.row(row)),
        change)).map(act), change);
    });
    const logits = this.lm_head.row(this.ln_f.row(x.at(-1)));
    const bigrams = this.bigramRow(ids.at(-1));
    return bigrams ? logits.map((v, i) => v + bigrams[i]) : logits;
  }
}

// ------------------------------------------------------------------------------------------------
// Byte-level BPE, as tiktoken does it. Its regular expressions are Rust's; JavaScript has neither possessive
// quantifiers, X?+, for which (?=(X?))\1 stands, nor everywhere (?i:...), which is spelled out.

const WHITE = "\\p{White_Space}";
const BOTH_CASES = c => [...new Set([c, c.toLowerCase(), c.toUpperCase(),
  ...(/s/i.test(c) ? ["\u017f"] : []), ...(/k/i.test(c) ? ["\u212a"] : [])])].join("");

function toRegExp(pattern) {
  let out = "", at = 0, groups = 0;
  const escape = inClass => {
    const c = pattern[at + 1];
    if (/[pP]/.test(c)) {
      const end = pattern[at + 2] === "{" ? pattern.indexOf("}", at) + 1 : at + 3;
      const name = pattern.slice(at + 2, end).replace(/[{}]/g, "");
      at = end;
      return `\\${c}{${name}}`;
    }
    at += 2;
    if (c === "s") return WHITE;
    if (c === "S") return "\\P{White_Space}";
    if (c === "d") return "\\p{Nd}";
    if (/[DwWbBnrtfv0xu]/.test(c)) return "\\" + c;
    return /[\^$\\.*+?()[\]{}|\/-]/.test(c) && (c !== "-" || inClass) ? "\\" + c : c;
  };
  const folded = (c, ignore, inClass) => {
    if (!ignore || !/\p{L}/u.test(c)) return c;
    return inClass ? BOTH_CASES(c) : `[${BOTH_CASES(c)}]`;
  };
  const set = ignore => {
    let text = "[";
    at++;
    if (pattern[at] === "^") text += pattern[at++];
    while (pattern[at] !== "]") {
      if (pattern[at] === "\\") { text += escape(true); continue; }
      if (pattern[at + 1] === "-" && pattern[at + 2] !== "]") {
        const [a, b] = [pattern[at], pattern[at + 2]];
        text += `${a}-${b}`;
        if (ignore && /[a-z]/i.test(a)) {
          text += `${a.toLowerCase()}-${b.toLowerCase()}`;
          text += `${a.toUpperCase()}-${b.toUpperCase()}`;
        }
        at += 3;
      } else text += folded(pattern[at++], ignore, true);
    }
    at++;
    return text + "]";
  };
  const sequence = ignore => {
    let text = "";
    while (at < pattern.length && pattern[at] !== ")") {
      const c = pattern[at];
      let atom;
      if (c === "(") {
        const open = /^\((\?(i)?:|\?<?[=!]|)/.exec(pattern.slice(at));
        at += open[0].length;
        atom = (open[2] || open[0] === "(" ? "(?:" : open[0]) + sequence(ignore || Boolean(open[2])) + ")";
        at++;
      } else if (c === "[") atom = set(ignore);
      else if (c === "\\") atom = escape(false);
      else if (c === ".") { atom = "[^\\n]"; at++; }
      else { atom = folded(String.fromCodePoint(pattern.codePointAt(at)), ignore, false);
        at += c.codePointAt(0) > 0xffff ? 2 : 1; }
      const times = /^([?*+]|\{\d+(,\d*)?\})([+?]?)/.exec(pattern.slice(at));
      if (!times) { text += atom; continue; }
      at += times[0].length;
      text += times[3] === "+" ? `(?=(?<p${++groups}>${atom}${times[1]}))\\k<p${groups}>` : atom + times[0];
    }
    return text;
  };
  out = sequence(false);
  return new RegExp(out, "gu");
}

class Tokenizer {
  constructor({pattern, tokens, special_tokens}) {
    const bytes = token => typeof token === "string" ? new TextEncoder().encode(token)
      : Uint8Array.from(token ?? []);
    this.bytes = tokens.map(bytes);
    this.ranks = new Map(this.bytes.map((b, id) => [String.fromCharCode(...b), id]).filter(([b]) => b));
    this.special = special_tokens;
    for (const [text, id] of Object.entries(special_tokens)) this.bytes[id] = new TextEncoder().encode(text);
    this.pattern = toRegExp(pattern);
    this.splits = new RegExp(Object.keys(special_tokens).map(s => s.replace(/[^\w]/g, "\\$&")).join("|")
      || "$^", "g");
  }
  encode(text) {
    const ids = [];
    let from = 0;
    text = text.toWellFormed ? text.toWellFormed() : text;
    for (const found of [...text.matchAll(this.splits), null]) {
      const pieces = text.slice(from, found?.index).matchAll(this.pattern);
      for (const [piece] of pieces) ids.push(...this.merge(piece));
      if (found) { ids.push(this.special[found[0]]); from = found.index + found[0].length; }
    }
    return ids;
  }
  merge(piece) {  // the pair of lowest rank is merged, the leftmost first, while there is one
    const text = Array.from(new TextEncoder().encode(piece), b => String.fromCharCode(b));
    if (this.ranks.has(text.join(""))) return [this.ranks.get(text.join(""))];
    for (;;) {
      let best = Infinity, where = -1;
      for (let i = 0; i + 1 < text.length; i++) {
        const rank = this.ranks.get(text[i] + text[i + 1]) ?? Infinity;
        if (rank < best) { best = rank; where = i; }
      }
      if (where < 0) return text.map(part => this.ranks.get(part));
      text.splice(where, 2, text[where] + text[where + 1]);
    }
  }
  decode(ids) {
    return new TextDecoder().decode(Uint8Array.from(ids.flatMap(id => [...this.bytes[id] ?? []])));
  }
  spell(id) {  // on one line
    const text = this.decode([id]).replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll("\r", "␍");
    if (/[^ ⏎⇥␍]/.test(text)) return text.replace(/^ /, "␣").replace(/ $/, "␣");
    return text.length > 4 ? text.replaceAll(" ", "") + `␣×${text.split(" ").length - 1}`
      : text.replaceAll(" ", "␣");
  }
}
