/* tests/dlm/test_chat_template.c - chat templates against transformers' apply_chat_template, and what is refused. */
#include "dlm/chat_template.h"

#include "core/file.h"
#include "core/memory.h"
#include "tests/test_util.h"

static rf_error err;
static rf_json *fixture;
static rf_chat_template *template;
static rf_text out;

static void setup(void) {
    rf_assert_ok(rf_json_open(&fixture, RF_FIXTURE_DIR "/chat-templates.json", &err), err);
}

static void teardown(void) {
    rf_chat_template_close(template);
    template = NULL;
    rf_text_clear(&out);
    rf_json_close(fixture);
}

static rf_status parse(const char *source) {
    rf_chat_template_close(template);
    return rf_chat_template_parse(&template, source, strlen(source), NULL, "t", &err);
}

static const rf_chat_message hello[] = {{"system", "be kind", 7}, {"user", "hi", 2}};

static rf_status render(const char *source) {
    out.num = 0;
    rf_status st = parse(source);
    if (st == RF_OK) st = rf_chat_template_render(template, hello, 2, NULL, &out, &err);
    return st;
}

/* ---- against transformers ---- */

static void parse_file(const char *name) {
    char path[512], *source;
    size_t num_bytes;
    snprintf(path, sizeof path, RF_FIXTURE_DIR "/chat-templates/%s", name);
    rf_assert_ok(rf_file_read(path, 1 << 20, &source, &num_bytes, &err), err);
    rf_chat_template_close(template);
    rf_assert_ok(
        rf_chat_template_parse(&template, source, num_bytes, rf_json_get(rf_json_root(fixture), "tokens"), name, &err),
        err);
    rf_free(source);
}

/* The same conversation as rf_chat_messages; false if a message has more than a role and a text. */
static bool plain_messages(const rf_json_value *list, rf_chat_message *messages, size_t *num) {
    *num = 0;
    for (const rf_json_value *m = rf_json_first(list); m; m = rf_json_next(m)) {
        const char *content = rf_json_string(rf_json_get(m, "content"));
        if (rf_json_count(m) != 2 || !content) return false;
        messages[(*num)++] = (rf_chat_message){rf_json_string(rf_json_get(m, "role")), content, strlen(content)};
    }
    return true;
}

START_TEST(published_templates_render_as_transformers_does) {
    int num_cases = 0, num_plain = 0, num_refused = 0;
    const rf_json_value *cases = rf_json_get(rf_json_root(fixture), "cases");
    for (const rf_json_value *c = rf_json_first(cases); c; c = rf_json_next(c), num_cases++) {
        const rf_json_value *variables = rf_json_get(c, "variables");
        const char *name = rf_json_string(rf_json_get(c, "template")), *text = rf_json_string(rf_json_get(c, "text"));
        rf_chat_options options = {.variables = variables};
        rf_assert_ok(rf_json_get_bool(fixture, c, "add_generation_prompt", &options.add_generation_prompt, &err), err);
        parse_file(name);
        out.num = 0;
        rf_status st = rf_chat_template_render(template, NULL, 0, &options, &out, &err);
        if (!text) {
            rf_assert_fails(st, err, RF_ERR_ARGUMENT, "single tool-calls");
            num_refused++;
            continue;
        }
        rf_assert_ok(st, err);
        ck_assert_msg(strcmp(out.bytes, text) == 0, "%s, case %d: got\n%s\nwant\n%s", name, num_cases, out.bytes, text);
        rf_chat_message messages[16];
        size_t num;
        if (rf_json_count(variables) > 1 || !plain_messages(rf_json_get(variables, "messages"), messages, &num))
            continue;
        options.variables = NULL;
        out.num = 0;
        rf_assert_ok(rf_chat_template_render(template, messages, num, &options, &out, &err), err);
        ck_assert_str_eq(out.bytes, text);
        num_plain++;
    }
    ck_assert(num_cases > 90 && num_plain > 20 && num_refused >= 2);
}
END_TEST

/* ---- the language ---- */

static const struct {
    const char *source, *text;
} renders[] = {
    {"", ""},
    {"a\n", "a"},
    {"a\n\n", "a\n"},
    {"a\r\nb\rc", "a\nb\nc"},
    {"{% if true %}\nx\n{% endif %}\ny", "x\ny"},
    {"  {% if true %}  x{% endif %}", "  x"},
    {" a {% if true %} b {% endif %} c ", " a  b  c "},
    {" a {%- if true -%} b {%- endif -%} c ", " abc "},
    {"  {%+ if true %}x{% endif +%}\ny", "  x\ny"},
    {"a {#- b -#} c", "ac"},
    {"{# {{ nothing }} #}x", "x"},
    {"{{ '}}' }}{{ \"%}\" }}", "}}%}"},
    {"{{ {'a': {'b': 1}}['a'].b }}", "1"},
    {"{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set k = 5 %}{% endfor %}{{ ns.n "
     "}}{{ k }}",
     "2"},
    {"{% for a in [1, 2] %}{% for b in [3, 4] %}{{ a * b }}{{ loop.last }} {% endfor %}{{ loop.last }}{% endfor %}",
     "3False 4True False6False 8True True"},
    {"{% for a in [1, 2] %}{% break %}{% else %}none{% endfor %}", "none"}, /* as Jinja has it */
    {"{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2"},
    {"{{ messages | length }}{{ messages[-1].role }}{{ messages[9] is defined }}", "2userFalse"},
    {"{{ 'a,b,c'.split(',') | join('+') }}{{ 'a,b,c'.split(',', 1) | last }}{{ '  x '.strip() }}{{ 'xxa'.lstrip('x') "
     "}}",
     "a+b+cb,cxa"},
    {"{{ [1, 'a', none, true] | tojson }}{{ {'k': '\\u00e9\\n'} | tojson(indent=2) }}",
     "[1, \"a\", null, true]{\n  \"k\": \"\xc3\xa9\\n\"\n}"},
    {"{{ 1.0 }} {{ 0.1 + 0.2 }} {{ 2 / 1 }} {{ 100000000000000000.0 }}", "1.0 0.30000000000000004 2.0 1e+17"},
    {"{{ none }}{{ true }}{{ nothing }}{{ nothing is defined }}{{ nothing or 'x' }}", "NoneTrueFalsex"},
    {"{{ '\xe6\x97\xa5\xe6\x9c\xac'[1] }}{{ '\xe6\x97\xa5\xe6\x9c\xac'[::-1] }}{{ '\xe6\x97\xa5\xe6\x9c\xac' | length "
     "}}",
     "\xe6\x9c\xac\xe6\x9c\xac\xe6\x97\xa5"
     "2"},
    {"{{ [0, 1, 2, 3, 4][4:0:-2] | join }}{{ [1, 2] + [3] == [1, 2, 3] }}{{ 3 in [1, 2] }}{{ 'role' in messages[0] }}",
     "42TrueFalseTrue"},
    {"{% generation %}x{% endgeneration %}", "x"},
    {"{{ (strftime_now('%Y') | length) }}{{ strftime_now is defined }}", "4True"},
};

START_TEST(sources_render) {
    rf_assert_ok(render(renders[_i].source), err);
    ck_assert_str_eq(out.bytes ? out.bytes : "", renders[_i].text);
}
END_TEST

static const struct {
    const char *source, *part;
} refusals[] = {
    {"{% macro f(x) %}{% endmacro %}", "line 1: statement 'macro'"},
    {"a\n{% include 'x' %}", "line 2: statement 'include'"},
    {"{% raw %}{% endraw %}", "statement 'raw'"},
    {"{{ x | wordcount }}", "filter 'wordcount'"},
    {"{% if false %}{{ x | wordcount }}{% endif %}", "filter 'wordcount'"},
    {"{{ x is divisibleby 3 }}", "test 'divisibleby'"},
    {"{{ f(1) }}", "function 'f'"},
    {"{{ cycler }}", "'cycler'"},
    {"{{ messages[0].content.title() }}", "method 'title' of a string"},
    {"{{ messages[0].items }}", "'items' as a value"},
    {"{{ messages }}", "the text of a list"},
    {"{{ nothing.x }}", "'nothing' is undefined"},
    {"{{ nothing + 'x' }}", "'nothing' is undefined"},
    {"{{ 'a' + 1 }}", "a string + an integer"},
    {"{{ 1 / 0 }}", "division by zero"},
    {"{{ 9223372036854775807 + 1 }}", "too large"},
    {"{{ 2 ** 3 }}", "**"},
    {"{{ 1e5 }}", "not decimal"},
    {"{% set a, b = 1, 2 %}", "set without one name"},
    {"{% set x %}y{% endset %}", "set without one name"},
    {"{% if x %}", "not closed"},
    {"{% for m in messages %}{% endif %}", "statement 'endif'"},
    {"{{ 'x", "string without its end"},
    {"{{ x", "{{ without }}"},
    {"{# x", "{# without #}"},
    {"{{ x ) }}", "bracket"},
    {"{{ loop.cycle }}{% for m in messages %}{{ loop.cycle }}{% endfor %}", "is undefined"},
    {"{% for m in messages %}{{ loop.depth }}{% endfor %}", "loop.depth"},
    {"{% for m in messages %}{{ messages | length }}{% endfor %}{% set messages = [] %}", "before it is set"},
    {"{% break %}", "outside a loop"},
    {"{{ '\\N{DASH}' }}", "escape"},
    {"{{ 'x' | upper(1) }}", "arguments of 'upper'"},
    {"{{ '\xc3\xa9' | upper }}", "beyond ASCII"},
    {"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than"},
    {"{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = [ns.x] %}{% endfor %}", "nested deeper"},
    {"{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(90) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, "
     "ns.b] %}"
     "{% endfor %}{{ ns.a == ns.b }}",
     "comparison"},
    {"{{ ((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((1",
     "nested deeper"},
};

START_TEST(what_is_not_known_is_refused_by_name) {
    rf_assert_fails(render(refusals[_i].source), err, RF_ERR_UNSUPPORTED, refusals[_i].part);
    ck_assert_ptr_null(strchr(err.message, '\n'));
    ck_assert_uint_eq(out.num, 0);
}
END_TEST

START_TEST(text_that_explodes_is_refused) {
    rf_status st = render("{% set ns = namespace(x='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ "
                          "ns.x %}{% endfor %}");
    rf_assert_fails(st, err, RF_ERR_UNSUPPORTED, "more than 256 MiB");
}
END_TEST

START_TEST(what_a_template_raises_is_its_message) {
    rf_assert_fails(render("{{ raise_exception('roles must\nalternate') }}"), err, RF_ERR_ARGUMENT,
                    "roles must alternate");
}
END_TEST

START_TEST(bad_messages_are_refused) {
    rf_chat_message bad = {"user", "\xff", 1};
    rf_assert_ok(parse("{{ messages[0].content }}"), err);
    rf_assert_fails(rf_chat_template_render(template, &bad, 1, NULL, &out, &err), err, RF_ERR_ARGUMENT, "message 1");
    rf_assert_fails(rf_chat_template_render(template, NULL, 0, NULL, &out, &err), err, RF_ERR_ARGUMENT,
                    "needs a message");
    rf_chat_template *none;
    rf_assert_fails(rf_chat_template_parse(&none, "\xff", 1, NULL, "t", &err), err, RF_ERR_FORMAT, "not valid UTF-8");
}
END_TEST

/* ---- folders ---- */

static char dir[256];

static void write_text(const char *name, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    rf_assert_ok(rf_file_write(path, text, strlen(text), &err), err);
}

START_TEST(folders_are_searched) {
    rf_temp_dir_make(dir, sizeof dir);
    rf_assert_fails(rf_chat_template_open(&template, dir, &err), err, RF_ERR_MISSING, "no chat template");
    write_text("tokenizer_config.json", "{\"chat_template\":[{\"name\":\"tool_use\",\"template\":\"t\"}]}");
    rf_assert_fails(rf_chat_template_open(&template, dir, &err), err, RF_ERR_MISSING, "\"default\"");
    write_text("tokenizer_config.json", "{\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":null,\"chat_template\":"
                                        "[{\"name\":\"tool_use\",\"template\":\"t\"},{\"name\":\"default\","
                                        "\"template\":\"{{ bos_token }}d{{ eos_token }}\"}]}");
    rf_assert_ok(rf_chat_template_open(&template, dir, &err), err);
    rf_assert_ok(rf_chat_template_render(template, hello, 2, NULL, &out, &err), err);
    ck_assert_str_eq(out.bytes, "<s>d");
    rf_chat_template_close(template);
    write_text("chat_template.jinja", "{{ bos_token }}file");
    rf_assert_ok(rf_chat_template_open(&template, dir, &err), err);
    rf_assert_ok(rf_chat_template_render(template, hello, 2, NULL, &out, &err), err);
    ck_assert_str_eq(out.bytes, "<s>d<s>file");
    rf_chat_template_close(template);
    write_text("chat_template.jinja", "{% macro f() %}");
    rf_assert_fails(rf_chat_template_open(&template, dir, &err), err, RF_ERR_UNSUPPORTED, "chat_template.jinja");
    write_text("tokenizer_config.json", "{\"chat_template\":7}");
    char path[512];
    snprintf(path, sizeof path, "%s/chat_template.jinja", dir);
    remove(path);
    rf_assert_fails(rf_chat_template_open(&template, dir, &err), err, RF_ERR_CONFIG, "chat_template");
    rf_temp_dir_remove(dir);
}
END_TEST

START_TEST(every_failed_allocation_is_survived) {
    const char *source =
        "{% set ns = namespace(a=[1]) %}{% for m in messages if m.role %}{{ m.content | trim ~ loop.index }}"
        "{% set ns.a = ns.a + [m.role.split('e') | join('-')] %}{% endfor %}{{ ns.a | tojson(indent=1) }}{{ 'a' 'b' }}";
    uint64_t live = rf_memory_get_counts().num_live, n = 1;
    for (;; n++) {
        rf_chat_template *t = NULL;
        rf_text text = {0};
        rf_memory_fail_nth(n);
        rf_status st = rf_chat_template_parse(&t, source, strlen(source), NULL, "t", &err);
        if (st == RF_OK) st = rf_chat_template_render(t, hello, 2, NULL, &text, &err);
        rf_memory_fail_nth(0);
        rf_chat_template_close(t);
        rf_text_clear(&text);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) break;
        ck_assert_msg(st == RF_ERR_MEMORY, "allocation %d: %s", (int)n, err.message);
    }
    ck_assert_uint_gt(n, 4);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("chat_template");
    TCase *tc = tcase_create("all");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, published_templates_render_as_transformers_does);
    tcase_add_loop_test(tc, sources_render, 0, sizeof renders / sizeof *renders);
    tcase_add_loop_test(tc, what_is_not_known_is_refused_by_name, 0, sizeof refusals / sizeof *refusals);
    tcase_add_test(tc, text_that_explodes_is_refused);
    tcase_add_test(tc, what_a_template_raises_is_its_message);
    tcase_add_test(tc, bad_messages_are_refused);
    tcase_add_test(tc, folders_are_searched);
    tcase_add_test(tc, every_failed_allocation_is_survived);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
