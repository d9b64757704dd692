# Operator {{.Operator}}: reads the lots that it was granted, and nothing else.
{{- range .Lots}}
path "{{$.Mount}}/data/lots/{{.}}/manifest" {
  capabilities = ["read"]
}
path "{{$.Mount}}/data/lots/{{.}}/shards/+" {
  capabilities = ["read"]
}
path "{{$.Mount}}/data/lots/{{.}}/revocations" {
  capabilities = ["read"]
}
path "{{$.Mount}}/data/lots/{{.}}/revoked/+" {
  capabilities = ["read"]
}
{{- end}}
