package main

import (
	"io"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"

	"github.com/imgfs/imgfs/fs"
	"github.com/imgfs/imgfs/images"
)

// metrics shows the counters of a server to Prometheus. It keeps none of its
// own: they are read when they are asked for, and reading them costs the same
// however many images are here.
type metrics struct {
	stats    func() fs.Stats
	totals   func() (images.Totals, error)
	registry *prometheus.Registry
}

func newMetrics(stats func() fs.Stats, totals func() (images.Totals, error)) (*metrics, error) {
	m := &metrics{stats: stats, totals: totals, registry: prometheus.NewRegistry()}
	for _, c := range []prometheus.Collector{
		m, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := m.registry.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// metric describes one of ours, and whether it only ever grows.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func counter(name, help string, labels ...string) metric {
	return metric{prometheus.NewDesc("imgfs_"+name, help, labels, nil), prometheus.CounterValue}
}

func gauge(name, help string, labels ...string) metric {
	return metric{prometheus.NewDesc("imgfs_"+name, help, labels, nil), prometheus.GaugeValue}
}

// Units are in the names, as Prometheus wants them.
var (
	metricBuild       = gauge("build_info", "Always 1; the version is the label.", "version")
	metricStarted     = gauge("start_time_seconds", "When the server started, in seconds since 1970.")
	metricFuse        = counter("fuse_messages_total", "Messages of the kernel, by operation.", "op")
	metricRequests    = counter("registry_requests_total", "Requests to registries.")
	metricBytes       = counter("registry_bytes_total", "Bytes that came from registries.")
	metricRetries     = counter("registry_retries_total", "Requests to registries that were made again.")
	metricErrors      = counter("errors_total", "Errors that were noted in .imgfs/errors.")
	metricReads       = counter("catalogue_reads_total", "Records that were read from the catalogue.")
	metricCacheLimit  = gauge("cache_limit_bytes", "The most that the cache keeps.")
	metricCacheUsed   = gauge("cache_used_bytes", "What the cache keeps.")
	metricCacheFree   = gauge("cache_free_bytes", "What the cache's file system has left.")
	metricImages      = gauge("images", "Images that are here: those with a name, and dangling ones.", "state")
	metricNames       = gauge("names", "Names of images that are here.")
	metricLayers      = gauge("layers", "Layers: in use by images, idle (on this disk, in no image), and those in use whose size is not known yet.", "state")
	metricSize        = gauge("size_bytes", "Bytes of all images, each layer once: compressed in the registry, expanded, in blocks on a disk (usage), of layers that several images have (shared) and that one has (unique), on this disk (cached).", "kind")
	metricReclaimable = gauge("reclaimable_bytes", "What a prune of everything would free: expanded, and of that on this disk (cached).", "kind")
)

var allMetrics = []metric{
	metricBuild, metricStarted, metricFuse, metricRequests, metricBytes, metricRetries, metricErrors, metricReads,
	metricCacheLimit, metricCacheUsed, metricCacheFree, metricImages, metricNames, metricLayers, metricSize, metricReclaimable,
}

// Describe is for the registry of metrics.
func (m *metrics) Describe(out chan<- *prometheus.Desc) {
	for _, d := range allMetrics {
		out <- d.desc
	}
}

// Collect reads the counters.
func (m *metrics) Collect(out chan<- prometheus.Metric) {
	send := func(d metric, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d.desc, d.kind, value, labels...)
	}
	s := m.stats()
	send(metricBuild, 1, version())
	send(metricStarted, float64(s.Started.UnixMilli())/1000)
	for op, n := range s.Fuse {
		send(metricFuse, float64(n), op)
	}
	send(metricRequests, float64(s.Registry.Requests))
	send(metricBytes, float64(s.Registry.Bytes))
	send(metricRetries, float64(s.Registry.Retries))
	send(metricErrors, float64(s.Errors))
	send(metricReads, float64(s.Catalogue.Reads))
	send(metricCacheLimit, float64(s.Cache.Limit))
	send(metricCacheUsed, float64(s.Cache.Used))
	send(metricCacheFree, float64(s.Cache.Free))

	t, err := m.totals()
	if err != nil {
		out <- prometheus.NewInvalidMetric(metricImages.desc, err)
		return
	}
	send(metricImages, float64(t.Tagged), "tagged")
	send(metricImages, float64(t.Dangling), "dangling")
	send(metricNames, float64(t.Names))
	send(metricLayers, float64(t.Layers), "used")
	send(metricLayers, float64(t.Idle), "idle")
	send(metricLayers, float64(t.Arriving), "arriving")
	for kind, n := range map[string]int64{
		"compressed": t.Compressed, "expanded": t.Expanded, "usage": t.Usage,
		"shared": t.Shared, "unique": t.Unique, "cached": t.Cached,
	} {
		send(metricSize, float64(n), kind)
	}
	send(metricReclaimable, float64(t.Reclaimable), "expanded")
	send(metricReclaimable, float64(t.ReclaimableCached), "cached")
}

// write writes all metrics in Prometheus' text format. What cannot be read is
// left out, with an error after the rest was written.
func (m *metrics) write(w io.Writer) error {
	families, err := m.registry.Gather()
	out := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := out.Encode(f); err != nil {
			return err
		}
	}
	return err
}
