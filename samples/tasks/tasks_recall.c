/* samples/tasks/tasks_recall.c - finding things in a long context: kv and what follows RULER's definitions (Hsieh et al.
 * 2024), with sentences and words of their own, so figures do not compare with published ones.
 *
 * The question is drawn apart from the context, so that settings.question chooses another about the same one; but the noise
 * is what the length of the question leaves room for. */
#include "tasks_parts.h"

#include <string.h>

/* ---- kv ----------------------------------------------------------------------------------------------------------- */

#define KV_KEYS 2600 /* a letter and two digits */

static void put_key(task_text *t, int key) {
    task_put_char(t, ' ');
    task_put_char(t, (char)('a' + key / 100));
    task_put_digits(t, key % 100, 2);
}

static void put_asked(task_text *t, const uint16_t *keys, const uint16_t *asked, int n) {
    task_put(t, " get");
    for (int i = 0; i < n; i++) put_key(t, keys[asked[i]]);
}

static void make_pairs(task_sample *s, int pairs, int queries) {
    uint16_t keys[KV_KEYS], asked[KV_KEYS], values[KV_KEYS];
    task_distinct(&s->rng, keys, KV_KEYS, pairs);
    task_distinct(&s->question_rng, asked, pairs, queries);
    task_put(&s->prompt, "kv");
    if (s->aware) {
        put_asked(&s->prompt, keys, asked, queries);
        task_put(&s->prompt, " from");
    }
    for (int i = 0; i < pairs; i++) {
        values[i] = (uint16_t)task_draw(&s->rng, 1000);
        put_key(&s->prompt, keys[i]);
        task_put_char(&s->prompt, '=');
        task_put_digits(&s->prompt, values[i], 3);
    }
    put_asked(&s->prompt, keys, asked, queries);
    task_put_char(&s->prompt, '=');
    for (int i = 0; i < queries; i++) {
        if (i > 0) task_put_char(&s->answer, ',');
        task_put_digits(&s->answer, values[asked[i]], 3);
    }
}

static void make_kv(task_sample *s) {
    make_pairs(s, s->size, task_draw_queries(&s->question_rng, s->size));
}

static void make_kv_long(task_sample *s) {
    int pairs = ((int)s->length - 32) / 8;
    make_pairs(s, pairs > KV_KEYS ? KV_KEYS : pairs, 1);
}

/* ---- a haystack of short sentences, and things to hide in it ------------------------------------------------------- */

static const char *const noise[] = {
    " The night is long.",     " The road is dark.",     " Here we go again.",           " There and back once more.",
    " The sun is not up yet.", " The sea is still.",     " A wind comes from the east.", " The king is not at home.",
    " They sit by the fire.",  " No one makes a sound.", " The horse is at the gate.",   " The light will not last.",
};
#define NOISE_NUM ((int)(sizeof noise / sizeof noise[0]))

/* Nouns that the tokenizer keeps whole. */
static const char *const words[] = {
    "heart",  "day",     "brother", "blood",   "night",  "name",   "hand",    "house",   "queen",   "world",  "wife",
    "mother", "grace",   "head",    "heaven",  "friend", "word",   "soul",    "news",    "crown",   "face",   "duke",
    "tongue", "peace",   "power",   "lady",    "master", "hope",   "earth",   "prince",  "husband", "place",  "cause",
    "tears",  "state",   "boy",     "eye",     "shame",  "cousin", "bed",     "answer",  "child",   "sorrow", "fellow",
    "war",    "body",    "woman",   "sun",     "hour",   "grief",  "fortune", "joy",     "years",   "law",    "grave",
    "matter", "comfort", "truth",   "sea",     "light",  "arms",   "wish",    "nature",  "gods",    "horse",  "city",
    "sleep",  "country", "fire",    "maid",    "sword",  "sister", "majesty", "doubt",   "breath",  "uncle",  "mercy",
    "kiss",   "traitor", "oath",    "justice", "ground", "friar",  "faith",   "loss",    "sin",     "sight",  "report",
    "beauty", "enemy",   "duty",    "deed",    "spirit", "reason", "purpose", "villain",
};
#define WORD_NUM ((int)(sizeof words / sizeof words[0]))

#define MAX_HIDDEN   24
#define HIDDEN_CHARS 64

/* Writes noise with the num hidden sentences in their order at random places, so that all is `budget` bytes at most; without
 * room for noise, the hidden sentences alone. */
static void put_haystack(task_sample *s, char hidden[][HIDDEN_CHARS], int num, size_t budget) {
    size_t used = 0, longest = 0;
    uint16_t lines[TASK_MAX_PROMPT / 16];
    int sentences = 0, left = num;
    for (int i = 0; i < num; i++) used += strlen(hidden[i]);
    for (int i = 0; i < NOISE_NUM; i++)
        if (strlen(noise[i]) > longest) longest = strlen(noise[i]);
    while (used + longest <= budget && sentences < TASK_MAX_PROMPT / 16) {
        lines[sentences] = (uint16_t)task_draw(&s->rng, NOISE_NUM);
        used += strlen(noise[lines[sentences++]]);
    }
    for (int i = 0, slots = sentences + num; i < sentences || left > 0; slots--)
        if (task_draw(&s->rng, slots) < left)
            task_put(&s->prompt, hidden[num - left--]);
        else
            task_put(&s->prompt, noise[lines[i++]]);
}

/* The prompt: title, the question first if it is to be known, haystack, question, "Answer:". */
static void put_prompt(task_sample *s, const char *title, const char *question, char hidden[][HIDDEN_CHARS], int num) {
    size_t fixed = strlen(title) + strlen(question) * (s->aware ? 2 : 1) + strlen(" Answer:");
    task_put(&s->prompt, title);
    if (s->aware) task_put(&s->prompt, question);
    put_haystack(s, hidden, num, s->length > fixed ? s->length - fixed : 0);
    task_put(&s->prompt, question);
    task_put(&s->prompt, " Answer:");
}

static void put_sentence(char *hidden, const char *key, int value) {
    task_text t = {.text = hidden, .size = HIDDEN_CHARS};
    task_put(&t, " The magic number for ");
    task_put(&t, key);
    task_put(&t, " is ");
    task_put_digits(&t, value, 5);
    task_put_char(&t, '.');
}

static int draw_value(task_rng *r) {
    return task_range(r, 10000, 99999);
}

static void make_needles(task_sample *s, int keys) {
    char hidden[MAX_HIDDEN][HIDDEN_CHARS], question[HIDDEN_CHARS];
    uint16_t order[WORD_NUM];
    int values[MAX_HIDDEN], asked = task_draw(&s->question_rng, keys);
    task_distinct(&s->rng, order, WORD_NUM, keys);
    for (int i = 0; i < keys; i++) put_sentence(hidden[i], words[order[i]], values[i] = draw_value(&s->rng));
    task_text q = {.text = question, .size = sizeof question};
    task_put(&q, " What is the magic number for ");
    task_put(&q, words[order[asked]]);
    task_put_char(&q, '?');
    put_prompt(s, "needle:", question, hidden, keys);
    task_put_digits(&s->answer, values[asked], 5);
}

static void make_needle(task_sample *s) {
    make_needles(s, 1);
}

static void make_needle_mk(task_sample *s) {
    int most = (int)(s->length / 100);
    make_needles(s, task_range(&s->rng, 4, most < 4 ? 4 : most > MAX_HIDDEN ? MAX_HIDDEN : most));
}

/* Two keys of four values each; all those of one are asked for. */
static void make_needle_mv(task_sample *s) {
    char hidden[8][HIDDEN_CHARS], question[HIDDEN_CHARS];
    uint16_t order[WORD_NUM], places[8];
    int asked = task_draw(&s->question_rng, 2);
    task_distinct(&s->rng, order, WORD_NUM, 2);
    task_distinct(&s->rng, places, 8, 8);
    for (int i = 0, n = 0; i < 8; i++) {
        int key = places[i] % 2, value = draw_value(&s->rng);
        put_sentence(hidden[i], words[order[key]], value);
        if (key != asked) continue;
        if (n++ > 0) task_put_char(&s->answer, ',');
        task_put_digits(&s->answer, value, 5);
    }
    task_text q = {.text = question, .size = sizeof question};
    task_put(&q, " What are the four magic numbers for ");
    task_put(&q, words[order[asked]]);
    task_put_char(&q, '?');
    put_prompt(s, "needle:", question, hidden, 8);
}

#define CHAINS 3
#define LINKS  5 /* of a chain: its number, and four hops */

static void make_vt_long(task_sample *s) {
    char hidden[CHAINS * LINKS][HIDDEN_CHARS], question[HIDDEN_CHARS];
    uint16_t names[100];
    int values[CHAINS], done[CHAINS] = {0}, asked = task_draw(&s->question_rng, CHAINS);
    task_distinct(&s->rng, names, 100, CHAINS * LINKS);
    for (int c = 0; c < CHAINS; c++) values[c] = draw_value(&s->rng);
    for (int i = 0; i < CHAINS * LINKS; i++) {
        int c = task_draw(&s->rng, CHAINS);
        while (done[c] == LINKS) c = (c + 1) % CHAINS;
        const uint16_t *name = &names[c * LINKS + done[c]];
        task_text t = {.text = hidden[i], .size = HIDDEN_CHARS};
        task_put(&t, " Set v");
        task_put_digits(&t, name[0], 2);
        task_put_char(&t, '=');
        if (done[c] == 0) {
            task_put_digits(&t, values[c], 5);
        } else {
            task_put_char(&t, 'v');
            task_put_digits(&t, name[-1], 2);
        }
        task_put_char(&t, '.');
        done[c]++;
    }
    task_text q = {.text = question, .size = sizeof question};
    task_put(&q, " Which five hold ");
    task_put_digits(&q, values[asked], 5);
    task_put_char(&q, '?');
    put_prompt(s, "vt-long:", question, hidden, CHAINS * LINKS);
    for (int i = 0; i < LINKS; i++) {
        task_put(&s->answer, i > 0 ? ",v" : "v");
        task_put_digits(&s->answer, names[asked * LINKS + i], 2);
    }
}

/* Four words several times as often as the others; listed in the order in which they first appear. */
#define CWE_COMMON 4
#define CWE_LENGTH 6 /* bytes of a word with its space, roughly */

static void make_cwe(task_sample *s) {
    static const char question[] = " Which four words are the most common?";
    uint16_t order[WORD_NUM];
    uint8_t list[TASK_MAX_PROMPT / 4];
    size_t fixed = strlen("cwe:") + strlen(question) * (s->aware ? 2 : 1) + strlen(" Answer:");
    size_t budget = s->length > fixed ? s->length - fixed : 0;
    /* every other word `rare` times and the common ones 4 x rare + 2 times: as many others as fit */
    int total = (int)(budget / CWE_LENGTH), rare = 1 + total / 130;
    int others = (total - CWE_COMMON * (4 * rare + 2)) / rare, num = 0;
    size_t used = 0;
    if (others < 8) others = 8;
    if (others > WORD_NUM - CWE_COMMON) others = WORD_NUM - CWE_COMMON;
    task_distinct(&s->rng, order, WORD_NUM, CWE_COMMON + others);
    for (int i = 0; i < CWE_COMMON + others; i++) {
        int times = i < CWE_COMMON ? 4 * rare + 2 : rare;
        size_t bytes = (strlen(words[order[i]]) + 1) * (size_t)times;
        if (i >= CWE_COMMON + 8 && used + bytes > budget) break;
        used += bytes;
        for (int k = 0; k < times && num < (int)sizeof list; k++) list[num++] = (uint8_t)i;
    }
    for (int i = num - 1; i > 0; i--) {
        int j = task_draw(&s->rng, i + 1);
        uint8_t t = list[i];
        list[i] = list[j];
        list[j] = t;
    }
    task_put(&s->prompt, "cwe:");
    if (s->aware) task_put(&s->prompt, question);
    for (int i = 0, seen = 0; i < num; i++) {
        const char *word = words[order[list[i]]];
        task_put_char(&s->prompt, ' ');
        task_put(&s->prompt, word);
        if (list[i] < CWE_COMMON && !(seen >> list[i] & 1)) {
            seen |= 1 << list[i];
            task_put_char(&s->answer, ' ');
            task_put(&s->answer, word);
        }
    }
    task_put_char(&s->prompt, '.');
    task_put(&s->prompt, question);
    task_put(&s->prompt, " Answer:");
}

/* ---- lists in any order ------------------------------------------------------------------------------------------- */

/* Length of the next run of anything but commas and spaces, to which *s moves; 0 at the end. */
static size_t next_item(const char **s, const char *end) {
    const char *p = *s;
    while (p < end && strchr(", ", *p) && *p) p++;
    *s = p;
    while (p < end && *p && !strchr(", ", *p)) p++;
    return (size_t)(p - *s);
}

static bool check_set(const char *prompt, const char *answer, const char *completion, size_t len) {
    int matched = 0, items = 0, given = 0;
    unsigned seen = 0;
    const char *a = answer, *a_end = answer + strlen(answer), *c, *c_end = completion + len;
    size_t n, m;
    (void)prompt;
    for (; (n = next_item(&a, a_end)) > 0; a += n) items++;
    for (c = completion; (m = next_item(&c, c_end)) > 0; c += m) {
        int i = 0;
        given++;
        for (a = answer; (n = next_item(&a, a_end)) > 0; a += n, i++)
            if (n == m && memcmp(a, c, n) == 0 && !(seen >> i & 1)) {
                seen |= 1u << i;
                matched++;
                break;
            }
    }
    return c == c_end && matched == items && given == items;
}

const task_entry task_recall_entries[] = {
    {{"kv", "values of keys", TASK_SHORT, true, "pairs", 1, 280, 4, 60, 0, 0}, make_kv, NULL},
    {{"kv-long", "the value of a key among as many as fit", TASK_RECALL, true, NULL, 0, 0, 0, 0, 256, 8192},
     make_kv_long,
     NULL},
    {{"needle", "a number hidden in noise", TASK_RECALL, true, NULL, 0, 0, 0, 0, 256, 16384}, make_needle, NULL},
    {{"needle-mk", "the number of one of many keys", TASK_RECALL, true, NULL, 0, 0, 0, 0, 256, 16384},
     make_needle_mk,
     NULL},
    {{"needle-mv", "all four numbers of a key", TASK_RECALL, true, NULL, 0, 0, 0, 0, 512, 16384},
     make_needle_mv,
     check_set},
    {{"vt-long", "the variables of a chain of assignments", TASK_RECALL, true, NULL, 0, 0, 0, 0, 512, 16384},
     make_vt_long,
     check_set},
    {{"cwe", "the most common words of a list", TASK_RECALL, true, NULL, 0, 0, 0, 0, 512, 16384}, make_cwe, check_set},
};
const int task_recall_num = (int)(sizeof task_recall_entries / sizeof task_recall_entries[0]);
