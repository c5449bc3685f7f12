/* dlm/chat_template.c - where a folder keeps its chat template, and what the template gets to see. */
#include "dlm/chat_template.h"

#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "dlm/chat_internal.h"
#include "dlm/tokenizer_internal.h"

/* bos_token and its like, of tokenizer_config.json: strings, or objects with content. */
static rf_status read_tokens(rf_chat_template *t, const rf_json_value *config, rf_error *err) {
    static const char *const keys[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                       "pad_token", "cls_token", "mask_token"};
    rf_chat_context x = {.pool = &t->pool, .name = t->name, .err = err};
    rf_value map, text;
    RF_TRY(rf_value_map_new(&x, &map));
    t->tokens = map.map;
    for (size_t i = 0; config && i < sizeof keys / sizeof *keys; i++) {
        const rf_json_value *v = rf_json_get(config, keys[i]);
        if (rf_json_is_object(v)) v = rf_json_get(v, "content");
        if (!rf_json_is_string(v)) continue;
        RF_TRY(rf_value_from_json(&x, v, &text));
        RF_TRY(rf_value_map_set(&x, t->tokens, (rf_str){keys[i], strlen(keys[i])}, text));
    }
    return RF_OK;
}

rf_status rf_chat_template_parse(rf_chat_template **out, const char *source, size_t num_bytes,
                                 const rf_json_value *config, const char *name, rf_error *err) {
    *out = NULL;
    rf_chat_template *t = rf_alloc_zero(1, sizeof *t);
    if (!t) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for the chat template", name);
    size_t name_bytes = strlen(name) + 1;
    char *copy = rf_chat_alloc(&t->pool, name_bytes);
    rf_status st = copy ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "%s: no memory for the chat template", name);
    if (copy) t->name = memcpy(copy, name, name_bytes);
    if (st == RF_OK) st = read_tokens(t, config, err);
    if (st == RF_OK) st = rf_chat_parse(&t->pool, source, num_bytes, t->name, &t->body, err);
    if (st != RF_OK) {
        rf_chat_template_close(t);
        return st;
    }
    *out = t;
    return RF_OK;
}

void rf_chat_template_close(rf_chat_template *t) {
    if (!t) return;
    rf_chat_pool_clear(&t->pool);
    rf_free(t);
}

/* The template in tokenizer_config.json; *source NULL if there is none. */
static rf_status find_in_config(const rf_json *doc, const char **source, rf_error *err) {
    const rf_json_value *root = rf_json_root(doc), *v = rf_json_get(root, "chat_template");
    *source = NULL;
    if (!rf_json_has(root, "chat_template")) return RF_OK;
    if (!rf_json_is_array(v)) return rf_json_get_string(doc, root, "chat_template", source, err);
    for (const rf_json_value *m = rf_json_first(v); m; m = rf_json_next(m)) {
        const char *name;
        RF_TRY(rf_json_get_string(doc, m, "name", &name, err));
        if (strcmp(name, "default") == 0) return rf_json_get_string(doc, m, "template", source, err);
    }
    return rf_fail(err, RF_ERR_MISSING, "%s: none of the chat templates is named \"default\"", rf_json_name(doc));
}

rf_status rf_chat_template_open(rf_chat_template **out, const char *folder, rf_error *err) {
    *out = NULL;
    char *config_path = rf_path_join(folder, "tokenizer_config.json"),
         *jinja_path = rf_path_join(folder, "chat_template.jinja");
    char *text = NULL;
    size_t num_bytes = 0;
    rf_json *doc = NULL;
    const char *source = NULL, *name = jinja_path;
    rf_status st = RF_OK;
    if (!config_path || !jinja_path) st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory", folder);
    if (st == RF_OK && rf_path_exists(config_path)) st = rf_json_open(&doc, config_path, err);
    if (st == RF_OK && rf_path_exists(jinja_path)) {
        st = rf_file_read(jinja_path, RF_CHAT_MAX_SOURCE, &text, &num_bytes, err);
        source = text;
    } else if (st == RF_OK && doc) {
        st = find_in_config(doc, &source, err);
        num_bytes = source ? strlen(source) : 0;
        name = config_path;
    }
    if (st == RF_OK && !source) st = rf_fail(err, RF_ERR_MISSING, "%s: this folder has no chat template", folder);
    if (st == RF_OK) st = rf_chat_template_parse(out, source, num_bytes, doc ? rf_json_root(doc) : NULL, name, err);
    rf_json_close(doc);
    rf_free(text);
    rf_free(config_path);
    rf_free(jinja_path);
    return st;
}

/* ---- rendering ---- */

static rf_status set_messages(const rf_chat_context *x, const rf_chat_message *messages, size_t num,
                              rf_value_map *globals) {
    rf_value list;
    RF_TRY(rf_value_list_new(x, &list));
    for (size_t i = 0; i < num; i++) {
        const rf_chat_message *m = &messages[i];
        size_t role_bytes = strlen(m->role);
        if (rf_utf8_valid((const uint8_t *)m->role, role_bytes) != role_bytes ||
            rf_utf8_valid((const uint8_t *)m->content, m->content_bytes) != m->content_bytes) {
            return rf_fail(x->err, RF_ERR_ARGUMENT, "message %zu of the conversation is not valid UTF-8", i + 1);
        }
        rf_value map;
        RF_TRY(rf_value_map_new(x, &map));
        RF_TRY(rf_value_map_set(x, map.map, RF_STR("role"),
                                (rf_value){.kind = RF_VALUE_STRING, .string = {m->role, role_bytes}}));
        RF_TRY(rf_value_map_set(x, map.map, RF_STR("content"),
                                (rf_value){.kind = RF_VALUE_STRING, .string = {m->content, m->content_bytes}}));
        RF_TRY(rf_value_list_add(x, list.list, map));
    }
    return rf_value_map_set(x, globals, RF_STR("messages"), list);
}

static rf_status set_globals(const rf_chat_context *x, const rf_chat_template *t, const rf_chat_message *messages,
                             size_t num, const rf_chat_options *options, rf_value_map *globals) {
    rf_value none = {.kind = RF_VALUE_NONE}, v;
    rf_value prompt = {.kind = RF_VALUE_BOOL, .boolean = options && options->add_generation_prompt};
    for (size_t i = 0; i < t->tokens->num; i++) {
        RF_TRY(rf_value_map_set(x, globals, t->tokens->keys[i], t->tokens->values[i]));
    }
    RF_TRY(set_messages(x, messages, num, globals));
    RF_TRY(rf_value_map_set(x, globals, RF_STR("tools"), none));
    RF_TRY(rf_value_map_set(x, globals, RF_STR("documents"), none));
    RF_TRY(rf_value_map_set(x, globals, RF_STR("add_generation_prompt"), prompt));
    const rf_json_value *variables = options ? options->variables : NULL;
    for (const rf_json_value *m = rf_json_first(variables); m; m = rf_json_next(m)) {
        const char *key = rf_json_key(m);
        if (!key) return rf_fail(x->err, RF_ERR_ARGUMENT, "the variables of a chat template must be an object");
        RF_TRY(rf_value_from_json(x, m, &v));
        RF_TRY(rf_value_map_set(x, globals, (rf_str){key, strlen(key)}, v));
    }
    const rf_value *list = rf_value_map_find(globals, RF_STR("messages"));
    if (!list || list->kind != RF_VALUE_LIST || list->list->num == 0) {
        return rf_fail(x->err, RF_ERR_ARGUMENT, "%s: a conversation for a chat template needs a message", x->name);
    }
    return RF_OK;
}

rf_status rf_chat_template_render(const rf_chat_template *t, const rf_chat_message *messages, size_t num_messages,
                                  const rf_chat_options *options, rf_text *out, rf_error *err) {
    rf_chat_pool pool = {0};
    rf_chat_context x = {.pool = &pool, .name = t->name, .err = err};
    rf_value globals;
    size_t num_before = out->num;
    rf_status st = rf_value_map_new(&x, &globals);
    if (st == RF_OK) st = set_globals(&x, t, messages, num_messages, options, globals.map);
    if (st == RF_OK) st = rf_text_append(out, NULL, 0, err);
    if (st == RF_OK) st = rf_chat_run(&x, t->body, globals.map, out);
    rf_chat_pool_clear(&pool);
    if (st != RF_OK && out->bytes) {
        out->num = num_before;
        out->bytes[num_before] = 0;
    }
    return st;
}
