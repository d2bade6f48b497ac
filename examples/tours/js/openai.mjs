// OpenAI's JavaScript SDK: every kind of call, whole and streamed, with the base model and an adapter.
import assert from 'node:assert/strict'
import OpenAI from 'openai'
import { CITY, MAX_TOKENS, MESSAGES, QUESTION, TEXTS, check, differ, embedder, end, fleet } from './checks.mjs'

const client = new OpenAI({ baseURL: fleet.v1, apiKey: fleet.key, maxRetries: 0 })
const chat = client.chat.completions
const greedy = { messages: MESSAGES, temperature: 0, max_tokens: MAX_TOKENS }
const said = {}

await check('models', async () => {
  const names = []
  for await (const model of client.models.list()) names.push(model.id)
  assert.ok(names.includes(fleet.adapter))
})
await check('base and adapter answer differently', async () => {
  for (const model of [fleet.base, fleet.adapter]) {
    const whole = await chat.create({ model, ...greedy })
    said[model] = whole.choices[0].message.content
    assert.equal(whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage.total_tokens)
    assert.ok(whole.usage.completion_tokens <= MAX_TOKENS)
  }
  differ(said[fleet.base], said[fleet.adapter])
})
await check('a stream equals the whole answer', async () => {
  for (const model of [fleet.base, fleet.adapter]) {
    let text = ''
    let usage = null
    for await (const chunk of await chat.create({ model, stream: true, stream_options: { include_usage: true }, ...greedy })) {
      text += chunk.choices[0]?.delta?.content ?? ''
      usage = chunk.usage ?? usage
    }
    assert.equal(text, said[model])
    assert.ok(usage.completion_tokens > 0)
  }
})
await check('completions', async () => {
  const scored = await client.completions.create({ model: fleet.adapter, prompt: 'Paris is big', echo: true, logprobs: 1, max_tokens: 0 })
  assert.equal(scored.choices[0].text, 'Paris is big')
  assert.ok(scored.choices[0].logprobs.token_logprobs.slice(1).every((value) => value <= 0))
})
await check('a tool is run: runTools()', async () => {
  const cities = []
  const tool = {
    type: 'function',
    function: {
      name: 'get_weather', parse: JSON.parse, function: ({ city }) => { cities.push(city); return 'sunny' },
      parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
    },
  }
  const forced = { type: 'function', function: { name: 'get_weather' } }
  await chat.runTools({ model: fleet.base, messages: MESSAGES, tools: [tool], tool_choice: forced, max_tokens: 100, temperature: 0 }).done()
  assert.equal(typeof cities[0], 'string')
})
await check('a structured output', async () => {
  for (const model of [fleet.base, fleet.adapter]) {
    const form = { type: 'json_schema', json_schema: { name: 'city', schema: CITY, strict: true } }
    const held = await chat.parse({ model, messages: MESSAGES, response_format: form, max_tokens: 200, temperature: 0 })
    const city = JSON.parse(held.choices[0].message.content)
    assert.deepEqual(Object.keys(city).sort(), ['is_capital', 'name'])
  }
})
await check('a stream is closed early, then the same answer', async () => {
  for await (const _ of await chat.create({ model: fleet.adapter, messages: MESSAGES, stream: true, max_tokens: 200 })) break
  assert.equal((await chat.create({ model: fleet.adapter, ...greedy })).choices[0].message.content, said[fleet.adapter])
})
if (embedder.url) {
  await check('embeddings of base and adapter, as base64 and as numbers', async () => {
    const there = new OpenAI({ baseURL: `${embedder.url}/v1`, apiKey: fleet.key, maxRetries: 0 })
    const made = []
    for (const model of ['base', embedder.adapter]) {
      const [short, plain] = [await there.embeddings.create({ model, input: TEXTS }), await there.embeddings.create({ model, input: TEXTS, encoding_format: 'float' })]
      plain.data[0].embedding.forEach((value, i) => assert.ok(Math.abs(value - short.data[0].embedding[i]) < 1e-4))
      made.push(plain.data[0].embedding)
    }
    differ(...made)
  })
}
await check('errors', async () => {
  await assert.rejects(chat.create({ model: 'nobody-has-this', messages: MESSAGES }), OpenAI.NotFoundError)
  await assert.rejects(chat.create({ ...greedy, model: fleet.base, max_tokens: 2 ** 30 }), OpenAI.BadRequestError)
  await assert.rejects(client.embeddings.create({ model: fleet.base, input: QUESTION }), OpenAI.APIError)
})
end()
