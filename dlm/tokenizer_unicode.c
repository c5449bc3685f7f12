/* dlm/tokenizer_unicode.c - UTF-8, character classes and NFC for the tokenizer.
 *
 * NFC    The `tokenizers` library composes with the tables of Unicode 9. Normalization of a character never changes once
 *        Unicode has it, so what is needed besides utf8proc's newer tables is a list of younger characters that take part in
 *        it: those pass as they are, as unassigned characters do.
 *        utf8proc's own decomposition puts marks in order by exchanging neighbours, which is quadratic; here long runs of
 *        marks are sorted by counting. */
#include <string.h>
#include <utf8proc.h>

#include "core/memory.h"
#include "dlm/tokenizer_internal.h"

/* ---- UTF-8 ---- */

uint32_t rf_utf8_next(const uint8_t *text, size_t num, size_t *len) {
    uint8_t a = text[0];
    if (a < 0x80 || num < 2) {
        *len = 1;
        return a;
    }
    if (a < 0xe0 || num < 3) {
        *len = 2;
        return ((uint32_t)(a & 0x1f) << 6) | (text[1] & 0x3f);
    }
    if (a < 0xf0 || num < 4) {
        *len = 3;
        return ((uint32_t)(a & 0x0f) << 12) | ((uint32_t)(text[1] & 0x3f) << 6) | (text[2] & 0x3f);
    }
    *len = 4;
    return ((uint32_t)(a & 0x07) << 18) | ((uint32_t)(text[1] & 0x3f) << 12) | ((uint32_t)(text[2] & 0x3f) << 6) |
           (text[3] & 0x3f);
}

size_t rf_utf8_last_len(const uint8_t *text, size_t num) {
    size_t len = 1;
    while (len < num && len < 4 && (text[num - len] & 0xc0) == 0x80) len++;
    return len;
}

size_t rf_utf8_put(uint32_t code, uint8_t out[4]) {
    if (code < 0x80) {
        out[0] = (uint8_t)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (uint8_t)(0xc0 | (code >> 6));
        out[1] = (uint8_t)(0x80 | (code & 0x3f));
        return 2;
    }
    if (code < 0x10000) {
        out[0] = (uint8_t)(0xe0 | (code >> 12));
        out[1] = (uint8_t)(0x80 | ((code >> 6) & 0x3f));
        out[2] = (uint8_t)(0x80 | (code & 0x3f));
        return 3;
    }
    out[0] = (uint8_t)(0xf0 | (code >> 18));
    out[1] = (uint8_t)(0x80 | ((code >> 12) & 0x3f));
    out[2] = (uint8_t)(0x80 | ((code >> 6) & 0x3f));
    out[3] = (uint8_t)(0x80 | (code & 0x3f));
    return 4;
}

/* Bytes of the sequence at text[0] that fit together (0 if the first is no lead byte); *want receives how many a whole one
 * has. Well-formed sequences: Unicode, table 3-7. */
static size_t sequence(const uint8_t *text, size_t num, size_t *want) {
    uint8_t a = text[0], low = 0x80, high = 0xbf;
    *want = 1;
    if (a < 0x80) return 1;
    if (a < 0xc2 || a > 0xf4) return 0;
    *want = a < 0xe0 ? 2 : a < 0xf0 ? 3 : 4;
    if (a == 0xe0) low = 0xa0;
    if (a == 0xed) high = 0x9f;
    if (a == 0xf0) low = 0x90;
    if (a == 0xf4) high = 0x8f;
    size_t len = 1;
    while (len < *want && len < num && text[len] >= low && text[len] <= high) {
        len++;
        low = 0x80;
        high = 0xbf;
    }
    return len;
}

size_t rf_utf8_valid(const uint8_t *text, size_t num) {
    size_t i = 0;
    while (i < num) {
        if (text[i] < 0x80) {
            uint64_t eight;
            for (; num - i >= sizeof eight; i += sizeof eight) {
                memcpy(&eight, text + i, sizeof eight);
                if (eight & 0x8080808080808080u) break;
            }
            while (i < num && text[i] < 0x80) i++;
            continue;
        }
        size_t want, len = sequence(text + i, num - i, &want);
        if (len != want) break;
        i += len;
    }
    return i;
}

size_t rf_utf8_broken(const uint8_t *text, size_t num, bool *cut) {
    size_t want, len = sequence(text, num, &want);
    *cut = len == num && len < want;
    return len ? len : 1;
}

/* ---- classes ---- */

bool rf_is_space(uint32_t c) {
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
    return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

static const rf_new_codes new_codes[] = {
    {0x897, 0x897, "Mn"},     {0xcf3, 0xcf3, "Mc"},     {0xece, 0xece, "Mn"},     {0x1b4e, 0x1b4f, "Po"},
    {0x1b7f, 0x1b7f, "Po"},   {0x1c89, 0x1c89, "Lu"},   {0x1c8a, 0x1c8a, "Ll"},   {0x2427, 0x2429, "So"},
    {0x2ffc, 0x2fff, "So"},   {0x31e4, 0x31e5, "So"},   {0x31ef, 0x31ef, "So"},   {0xa7cb, 0xa7cc, "Lu"},
    {0xa7cd, 0xa7cd, "Ll"},   {0xa7da, 0xa7da, "Lu"},   {0xa7db, 0xa7db, "Ll"},   {0xa7dc, 0xa7dc, "Lu"},
    {0x105c0, 0x105f3, "Lo"}, {0x10d40, 0x10d49, "Nd"}, {0x10d4a, 0x10d4d, "Lo"}, {0x10d4e, 0x10d4e, "Lm"},
    {0x10d4f, 0x10d4f, "Lo"}, {0x10d50, 0x10d65, "Lu"}, {0x10d69, 0x10d6d, "Mn"}, {0x10d6e, 0x10d6e, "Pd"},
    {0x10d6f, 0x10d6f, "Lm"}, {0x10d70, 0x10d85, "Ll"}, {0x10d8e, 0x10d8f, "Sm"}, {0x10ec2, 0x10ec4, "Lo"},
    {0x10efc, 0x10eff, "Mn"}, {0x1123f, 0x11240, "Lo"}, {0x11241, 0x11241, "Mn"}, {0x11380, 0x11389, "Lo"},
    {0x1138b, 0x1138b, "Lo"}, {0x1138e, 0x1138e, "Lo"}, {0x11390, 0x113b5, "Lo"}, {0x113b7, 0x113b7, "Lo"},
    {0x113b8, 0x113ba, "Mc"}, {0x113bb, 0x113c0, "Mn"}, {0x113c2, 0x113c2, "Mc"}, {0x113c5, 0x113c5, "Mc"},
    {0x113c7, 0x113ca, "Mc"}, {0x113cc, 0x113cd, "Mc"}, {0x113ce, 0x113ce, "Mn"}, {0x113cf, 0x113cf, "Mc"},
    {0x113d0, 0x113d0, "Mn"}, {0x113d1, 0x113d1, "Lo"}, {0x113d2, 0x113d2, "Mn"}, {0x113d3, 0x113d3, "Lo"},
    {0x113d4, 0x113d5, "Po"}, {0x113d7, 0x113d8, "Po"}, {0x113e1, 0x113e2, "Mn"}, {0x116d0, 0x116e3, "Nd"},
    {0x1171e, 0x1171e, "Mc"}, {0x11b00, 0x11b09, "Po"}, {0x11bc0, 0x11be0, "Lo"}, {0x11be1, 0x11be1, "Po"},
    {0x11bf0, 0x11bf9, "Nd"}, {0x11f00, 0x11f01, "Mn"}, {0x11f02, 0x11f02, "Lo"}, {0x11f03, 0x11f03, "Mc"},
    {0x11f04, 0x11f10, "Lo"}, {0x11f12, 0x11f33, "Lo"}, {0x11f34, 0x11f35, "Mc"}, {0x11f36, 0x11f3a, "Mn"},
    {0x11f3e, 0x11f3f, "Mc"}, {0x11f40, 0x11f40, "Mn"}, {0x11f41, 0x11f41, "Mc"}, {0x11f42, 0x11f42, "Mn"},
    {0x11f43, 0x11f4f, "Po"}, {0x11f50, 0x11f59, "Nd"}, {0x11f5a, 0x11f5a, "Mn"}, {0x1342f, 0x1342f, "Lo"},
    {0x13439, 0x1343f, "Cf"}, {0x13440, 0x13440, "Mn"}, {0x13441, 0x13446, "Lo"}, {0x13447, 0x13455, "Mn"},
    {0x13460, 0x143fa, "Lo"}, {0x16100, 0x1611d, "Lo"}, {0x1611e, 0x16129, "Mn"}, {0x1612a, 0x1612c, "Mc"},
    {0x1612d, 0x1612f, "Mn"}, {0x16130, 0x16139, "Nd"}, {0x16d40, 0x16d42, "Lm"}, {0x16d43, 0x16d6a, "Lo"},
    {0x16d6b, 0x16d6c, "Lm"}, {0x16d6d, 0x16d6f, "Po"}, {0x16d70, 0x16d79, "Nd"}, {0x18cff, 0x18cff, "Lo"},
    {0x1b132, 0x1b132, "Lo"}, {0x1b155, 0x1b155, "Lo"}, {0x1cc00, 0x1ccef, "So"}, {0x1ccf0, 0x1ccf9, "Nd"},
    {0x1cd00, 0x1ceb3, "So"}, {0x1d2c0, 0x1d2d3, "No"}, {0x1df25, 0x1df2a, "Ll"}, {0x1e030, 0x1e06d, "Lm"},
    {0x1e08f, 0x1e08f, "Mn"}, {0x1e4d0, 0x1e4ea, "Lo"}, {0x1e4eb, 0x1e4eb, "Lm"}, {0x1e4ec, 0x1e4ef, "Mn"},
    {0x1e4f0, 0x1e4f9, "Nd"}, {0x1e5d0, 0x1e5ed, "Lo"}, {0x1e5ee, 0x1e5ef, "Mn"}, {0x1e5f0, 0x1e5f0, "Lo"},
    {0x1e5f1, 0x1e5fa, "Nd"}, {0x1e5ff, 0x1e5ff, "Po"}, {0x1f6dc, 0x1f6dc, "So"}, {0x1f774, 0x1f776, "So"},
    {0x1f77b, 0x1f77f, "So"}, {0x1f7d9, 0x1f7d9, "So"}, {0x1f8b2, 0x1f8bb, "So"}, {0x1f8c0, 0x1f8c1, "So"},
    {0x1fa75, 0x1fa77, "So"}, {0x1fa87, 0x1fa89, "So"}, {0x1fa8f, 0x1fa8f, "So"}, {0x1faad, 0x1faaf, "So"},
    {0x1fabb, 0x1fabf, "So"}, {0x1fac6, 0x1fac6, "So"}, {0x1face, 0x1facf, "So"}, {0x1fada, 0x1fadc, "So"},
    {0x1fadf, 0x1fadf, "So"}, {0x1fae8, 0x1fae9, "So"}, {0x1faf7, 0x1faf8, "So"}, {0x1fbcb, 0x1fbef, "So"},
    {0x2b739, 0x2b739, "Lo"}, {0x2ebf0, 0x2ee5d, "Lo"}, {0x31350, 0x323af, "Lo"},
};

const rf_new_codes *rf_unicode_new(size_t *num) {
    *num = sizeof new_codes / sizeof *new_codes;
    return new_codes;
}

bool rf_is_word(uint32_t c) {
    if (c < 0x80) return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_';
    if (c == 0x200c || c == 0x200d) return true;
    /* circled and squared letters are symbols, and alphabetic */
    if ((c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
        (c >= 0x1f170 && c <= 0x1f189)) {
        return true;
    }
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_PC: return true;
    default: break;
    }
    for (size_t i = 0; i < sizeof new_codes / sizeof *new_codes && c >= new_codes[i].first; i++) {
        if (c > new_codes[i].last) continue;
        const char *category = new_codes[i].category;
        return category[0] == 'L' || category[0] == 'M' || strcmp(category, "Nd") == 0;
    }
    return false;
}

/* ---- NFC ---- */

/* Characters younger than Unicode 9 that have a combining class or take part in a composition. */
static const struct {
    uint32_t first, last;
} inert[] = {
    {0x7fd, 0x7fd},     {0x897, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},     {0xc3c, 0xc3c},
    {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x1715, 0x1715},   {0x1abf, 0x1add},   {0x1ae0, 0x1aeb},
    {0x1df6, 0x1dfa},   {0xa82c, 0xa82c},   {0x105c0, 0x105ff}, {0x10d24, 0x10d27}, {0x10d69, 0x10d6d},
    {0x10eab, 0x10eac}, {0x10efa, 0x10eff}, {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070},
    {0x1133b, 0x1133b}, {0x11380, 0x113ff}, {0x1145e, 0x1145e}, {0x11839, 0x1183a}, {0x11900, 0x1195f},
    {0x119e0, 0x119e0}, {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42},
    {0x11d44, 0x11d45}, {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16100, 0x1613f}, {0x16d40, 0x16d7f},
    {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef},
    {0x1e4ec, 0x1e4ef}, {0x1e5ee, 0x1e5ef}, {0x1e6e3, 0x1e6e3}, {0x1e6e6, 0x1e6e6}, {0x1e6ee, 0x1e6ef},
    {0x1e6f5, 0x1e6f5},
};

static bool is_inert(uint32_t c) {
    const size_t num = sizeof inert / sizeof *inert;
    size_t low = 0, high = num;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (c > inert[middle].last) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < num && c >= inert[low].first;
}

typedef enum {
    NFC_BASE,  /* a starter that stays, and that nothing before it composes with */
    NFC_INERT, /* the same, and nothing after composes with it */
    NFC_WORK
} nfc_kind;

static nfc_kind kind_of(uint32_t c) {
    /* ranges that hold nothing but bases; composed kana and Hangul syllables change only with what follows */
    if (c < 0x300 || (c >= 0x3400 && c <= 0x9fff) || (c >= 0xac00 && c <= 0xd7a3) || (c >= 0x3030 && c <= 0x3098) ||
        (c >= 0x309b && c <= 0x312f) || (c >= 0x2010 && c <= 0x20cf) || (c >= 0xff00 && c <= 0xffef) ||
        (c >= 0x1f000 && c <= 0x1faff)) {
        return NFC_BASE;
    }
    if (is_inert(c)) return NFC_INERT;
    if ((c >= 0x1100 && c <= 0x11ff) || (c >= 0xa960 && c <= 0xa97f) || (c >= 0xd7b0 && c <= 0xd7ff)) return NFC_WORK;
    const utf8proc_property_t *p = utf8proc_get_property((utf8proc_int32_t)c);
    if (p->combining_class != 0 || (p->decomp_seqindex != UINT16_MAX && p->decomp_type == 0)) return NFC_WORK;
    bool mark = p->category == UTF8PROC_CATEGORY_MN || p->category == UTF8PROC_CATEGORY_MC ||
                p->category == UTF8PROC_CATEGORY_ME;
    return mark ? NFC_WORK : NFC_BASE;
}

typedef struct {
    int32_t *codes;
    size_t num, capacity;
} code_list;

static bool code_reserve(code_list *list, size_t more) {
    if (list->capacity - list->num >= more) return true;
    size_t capacity = list->capacity * 2 + more + 64;
    int32_t *codes = rf_realloc(list->codes, capacity * sizeof *codes);
    if (!codes) return false;
    list->codes = codes;
    list->capacity = capacity;
    return true;
}

static int class_of(int32_t c) {
    return utf8proc_get_property(c)->combining_class;
}

/* Stable, by combining class; all of codes[num] are marks. scratch has room for num. */
static void sort_marks(int32_t *codes, size_t num, int32_t *scratch) {
    if (num <= 32) {
        for (size_t i = 1; i < num; i++) {
            int32_t c = codes[i];
            int class = class_of(c);
            size_t k = i;
            for (; k > 0 && class_of(codes[k - 1]) > class; k--) codes[k] = codes[k - 1];
            codes[k] = c;
        }
        return;
    }
    size_t starts[257] = {0};
    for (size_t i = 0; i < num; i++) starts[class_of(codes[i]) + 1]++;
    for (int k = 1; k < 257; k++) starts[k] += starts[k - 1];
    for (size_t i = 0; i < num; i++) scratch[starts[class_of(codes[i])]++] = codes[i];
    memcpy(codes, scratch, num * sizeof *codes);
}

/* NFC of one stretch of text, appended to out. */
static rf_status compose(const uint8_t *text, size_t num, code_list *list, rf_text *out, rf_error *err) {
    list->num = 0;
    for (size_t i = 0, len; i < num; i += len) {
        int32_t parts[32];
        uint32_t c = rf_utf8_next(text + i, num - i, &len);
        int last_class = 0;
        utf8proc_ssize_t got =
            utf8proc_decompose_char((utf8proc_int32_t)c, parts, 32, UTF8PROC_STABLE | UTF8PROC_DECOMPOSE, &last_class);
        if (got < 1 || got > 32) return rf_fail(err, RF_ERR_FORMAT, "NFC: U+%04X cannot be decomposed", (unsigned)c);
        if (!code_reserve(list, (size_t)got)) return rf_fail(err, RF_ERR_MEMORY, "NFC: no memory");
        memcpy(list->codes + list->num, parts, (size_t)got * sizeof *parts);
        list->num += (size_t)got;
    }
    size_t total = list->num;
    if (!code_reserve(list, total)) return rf_fail(err, RF_ERR_MEMORY, "NFC: no memory"); /* scratch of the sort */
    for (size_t i = 0; i < total;) {
        if (class_of(list->codes[i]) == 0) {
            i++;
            continue;
        }
        size_t end = i + 1;
        while (end < total && class_of(list->codes[end]) != 0) end++;
        sort_marks(list->codes + i, end - i, list->codes + total);
        i = end;
    }
    utf8proc_ssize_t left =
        utf8proc_normalize_utf32(list->codes, (utf8proc_ssize_t)total, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (left < 0) return rf_fail(err, RF_ERR_FORMAT, "NFC: %s", utf8proc_errmsg(left));
    for (utf8proc_ssize_t i = 0; i < left; i++) {
        uint8_t bytes[4];
        RF_TRY(rf_text_append(out, bytes, rf_utf8_put((uint32_t)list->codes[i], bytes), err));
    }
    return RF_OK;
}

rf_status rf_nfc(const uint8_t *text, size_t num, rf_text *out, bool *changed, rf_error *err) {
    code_list list = {0};
    rf_status st = RF_OK;
    size_t done = 0; /* text before it is in out */
    size_t base = 0; /* where composing has to start: the last base, or after the last inert character */
    *changed = false;
    for (size_t i = 0, len; st == RF_OK && i < num; i += len) {
        if (text[i] < 0xcc) { /* below U+0300 */
            base = i;
            len = text[i] < 0x80 ? 1 : 2;
            continue;
        }
        nfc_kind kind = kind_of(rf_utf8_next(text + i, num - i, &len));
        if (kind != NFC_WORK) {
            base = kind == NFC_BASE ? i : i + len;
            continue;
        }
        size_t end = i + len;
        while (end < num) {
            size_t next_len;
            kind = kind_of(rf_utf8_next(text + end, num - end, &next_len));
            if (kind != NFC_WORK) break;
            end += next_len;
        }
        if (!*changed) {
            *changed = true;
            out->num = 0;
        }
        st = rf_text_append(out, text + done, base - done, err);
        if (st == RF_OK) st = compose(text + base, end - base, &list, out, err);
        done = base = end;
        len = end - i;
    }
    if (st == RF_OK && *changed) st = rf_text_append(out, text + done, num - done, err);
    rf_free(list.codes);
    return st;
}
