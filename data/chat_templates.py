"""Chat formats without a checkpoint's own template, as Jinja; `{% generation %}` marks what the model writes.

Each takes messages of plain text and refuses tools, tool calls and reasoning, for which it has no place.
Sources: the prompt formats in Meta's model cards for llama2 and llama3, OpenAI's ChatML for chatml.
"""

_TEXT_ONLY = """\
{%- if tools %}
    {{- raise_exception('this chat template has no place for tools') }}
{%- endif %}
{%- for message in messages if message.reasoning_content %}
    {{- raise_exception('this chat template has no place for reasoning; write it into the content') }}
{%- endfor %}
{%- for message in messages if message.content is not string or message.tool_calls %}
    {{- raise_exception('this chat template takes plain text only, got something else from ' + message.role) }}
{%- endfor %}
"""

_LLAMA2 = """\
{%- set has_system = messages[0].role == 'system' %}
{%- if messages | length == 1 and has_system %}
    {{- raise_exception('a system message needs a user message behind it') }}
{%- endif %}
{%- for message in (messages[1:] if has_system else messages) %}
    {%- if message.role != loop.cycle('user', 'assistant') %}
        {{- raise_exception('user and assistant have to take turns, got ' + message.role) }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{ ' ' + message.content | trim + ' ' + eos_token | default('</s>', true) }}{% endgeneration %}
    {%- else %}
        {%- set content = message.content %}
        {%- if loop.first and has_system %}
            {%- set content = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' + content %}
        {%- endif %}
        {{- bos_token | default('<s>', true) + '[INST] ' + content | trim + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""

_LLAMA3 = """\
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_QA = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content | trim + '\\n\\n' }}
    {%- elif message.role == 'user' %}
        {{- 'Question: ' + message.content | trim + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Answer:' }}
        {%- generation %}{{ ' ' + message.content | trim + eos_token | default('', true) }}{% endgeneration %}
        {{- '' if loop.last else '\\n\\n' }}
    {%- else %}
        {{- raise_exception('a question-answer chat has no role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Answer:' }}
{%- endif %}
"""

CHAT_TEMPLATES: dict[str, str] = {
    name: _TEXT_ONLY + template
    for name, template in {"llama2": _LLAMA2, "llama3": _LLAMA3, "chatml": _CHATML, "qa": _QA}.items()
}
