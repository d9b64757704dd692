# Sums the samples of perf script -F ip,sym,dso, by what they are spent on, as a table in Markdown; us is what one
# attach takes in all. A sample is a paragraph: its frames from the innermost on, each an address, a symbol and (file).
# C code has no frames but the innermost. What is spent in Go's runtime or its libraries counts for the package that has
# called it, if there is one below.
BEGIN {
	RS = ""
	FS = "\n"
	store = "store: SQL from Go"
	wire = "HTTP/2, TLS"
	messages = "protobuf, Connect"
	log_ = "log, metrics, trace"
	service = "the service itself"
	module = "HSM module, by way of Go"
	rule("kmehsm/internal/rowmac", "row MACs")
	rule("kmehsm/binding/sqlstore", store)
	rule("kmehsm/internal/sql", store)
	rule("go-sqlite3", store)
	rule("jackc/pgx", store)
	rule("database/sql", store)
	rule("kmehsm/hsmkeys", module)
	rule("miekg/pkcs11", module)
	rule("google.golang.org/protobuf", messages)
	rule("connectrpc.com", messages)
	rule("log/slog", log_)
	rule("prometheus", log_)
	rule("opentelemetry", log_)
	rule("kmehsm/directory", "the directory")
	rule("kmehsm/", service)
	rule("net/http", wire)
	rule("golang.org/x/net", wire)
	rule("crypto/tls", wire)
	rule(" net.", wire)
	rule("internal/poll", wire)
}
function rule(name, is) {
	names[++rules] = name
	kind[rules] = is
}
function category(    i, j, at, symbol) {
	if ($1 ~ /\[kernel|\[vdso/) {
		if ($0 ~ / (tcp|sock|inet|unix_stream|ip)_|epoll/) return "kernel: sockets"
		if ($0 ~ /fsync|fdatasync|pwrite|ftruncate|pread/) return "kernel: SQLite's files"
		if ($0 ~ /open|close|_read|fcntl|newfstat|vfs_statx|lseek|flock|getdents/) return "kernel: SoftHSM's files"
		return $0 ~ /page_fault/ ? "kernel: page faults" : "kernel: threads"
	}
	if ($1 ~ /libsofthsm2|libcrypto|libstdc\+\+/) return "HSM module: SoftHSM, libcrypto"
	if ($1 ~ /libc\.so/) return "libc: malloc and copies of SoftHSM and SQLite"
	split($1, at, " ")
	symbol = at[2]
	sub(/\.(isra|constprop|part|cold).*/, "", symbol)
	# In keysvc itself, what has no package is SQLite's, but for the assembler of Go's libraries.
	if ($1 ~ /keysvc/ && symbol !~ /[.\/]/ &&
	    symbol !~ /^(p256|aeshash|memeqbody|cmpbody|indexbyte|count|gcWrite|_cgo|crosscall|x_cgo|\[unknown)/)
		return symbol == "unwrap" ? module : "SQLite"
	for (i = 1; i <= NF; i++)
		for (j = 1; j <= rules; j++)
			if (index($i, names[j])) return kind[j]
	return $0 ~ / runtime\.|_cgo|crosscall/ ? "Go's runtime: scheduler, collector, stacks" : "other"
}
{
	count[category()]++
}
END {
	print "| | share | us |\n|---|---|---|"
	for (name in count)
		printf "| %s | %.1f%% | %.0f |\n", name, 100 * count[name] / NR, us * count[name] / NR | "sort -t '|' -k 4 -rn"
	close("sort -t '|' -k 4 -rn")
	printf "| all, of %d samples | | %.0f |\n", NR, us
}
