import io.debezium.engine.ChangeEvent;
import io.debezium.engine.DebeziumEngine;
import io.debezium.engine.Header;
import io.debezium.engine.format.Json;
import io.debezium.storage.redis.RedisClient;
import io.debezium.storage.redis.RedisConnection;
import java.io.FileReader;
import java.util.AbstractMap.SimpleEntry;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.Executors;

/**
 * Debezium's engine, writing to Redis Streams what the Redis sink of Debezium Server writes there in its extended message
 * format: the fields key and value, and a field for each header. Debezium Server itself comes as no package.
 *
 * <p>java -cp 'libs/*' RedisSink.java PROPERTIES REDIS_PORT. SIGTERM ends it in order.
 */
public class RedisSink {
    /** redis.batch.size of the sink. */
    private static final int BATCH = 500;

    public static void main(String[] arguments) throws Exception {
        Properties properties = new Properties();
        try (FileReader file = new FileReader(arguments[0])) {
            properties.load(file);
        }
        String address = "127.0.0.1:" + arguments[1];
        RedisClient redis = new RedisConnection(address, 0, null, null, 2_000, 2_000, false)
                .getRedisClient("debezium:redis:sink", false, 0, false, 0);
        DebeziumEngine<ChangeEvent<String, String>> engine = DebeziumEngine.create(Json.class)
                .using(properties)
                .using((success, message, error) -> {
                    if (!success) {
                        System.err.println(message);
                        System.exit(1);
                    }
                })
                .notifying((events, committer) -> {
                    for (int from = 0; from < events.size(); from += BATCH) {
                        List<ChangeEvent<String, String>> batch = events.subList(from, Math.min(from + BATCH, events.size()));
                        append(redis, batch);
                        for (ChangeEvent<String, String> event : batch) {
                            committer.markProcessed(event);
                        }
                    }
                    committer.markBatchFinished();
                })
                .build();
        Runtime.getRuntime().addShutdownHook(new Thread(() -> {
            try {
                engine.close();
            }
            catch (Exception error) {
                System.err.println(error);
            }
        }));
        Executors.newSingleThreadExecutor().execute(engine);
    }

    private static void append(RedisClient redis, List<ChangeEvent<String, String>> batch) {
        List<SimpleEntry<String, Map<String, String>>> entries = new ArrayList<>();
        for (ChangeEvent<String, String> event : batch) {
            Map<String, String> fields = new LinkedHashMap<>();
            fields.put("key", event.key() == null ? "default" : event.key());
            fields.put("value", event.value() == null ? "default" : event.value());
            for (Header<?> header : event.headers()) {
                fields.put(header.getKey().toUpperCase(Locale.ROOT), String.valueOf(header.getValue()));
            }
            entries.add(new SimpleEntry<>(event.destination(), fields));
        }
        redis.xadd(entries);
    }
}
